"""What the notebooks have in common, and running them all."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "exercises": ["check"],
        "faults": ["sixth_fault"],
        "run_notebooks": ["execute", "notebooks", "run_all"],
        "setup": [
            "QUESTIONS",
            "expect",
            "middle_checkpoint",
            "reference_dtype",
            "scratch_copy",
            "scratch_engine",
            "scratch_file",
            "start",
        ],
        "walk": ["draw_walk", "walk_rows"],
    },
)
