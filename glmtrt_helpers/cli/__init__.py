"""`glmtrt`: the steps of the notebooks on the command line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "doctor": ["parts", "report"],
    },
)
