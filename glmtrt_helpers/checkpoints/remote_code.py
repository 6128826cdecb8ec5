"""Run remote code of 2023 on transformers 5 and torch 2.13: the shims that it needs, and the model built with them.

Generation is not shimmed: upstream's `chat` and `generate` use internals that transformers has removed since, so the
workbook calls `forward` itself (`sessions.decode_loop`).
"""

import ast
import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from transformers.utils import logging

from glmtrt_helpers.checkpoints.code_hash import announce, code_sha256
from glmtrt_helpers.checkpoints.python_source import half_casts, naming, parse_source, read_source
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.text import shorten

MODEL_CLASS = "ChatGLMForConditionalGeneration"
_PACKAGE = re.compile(r"glmtrt_remote_\w+\.")  # of one checkpoint's sources, and of one revision of them
_NO_MEMORY = re.compile("(allocate|out of) memory")  # how torch words it


@dataclass(frozen=True)
class Shim:
    """One repair: what breaks without it, and how it is fixed."""

    name: str
    breaks: str
    fix: str


SHIMS = (
    Shim(
        "skip_init",
        "the constructor allocates every weight on the CPU, 13 GB that loading throws away",
        "built on the meta device with plain constructors",
    ),
    Shim(
        "inv_freq",
        "a checkpoint without rotary_emb.inv_freq would leave it uninitialised, and upstream ignores a stored one",
        "computed: 10000^(-2j/d) rounded to fp16",
    ),
    Shim(
        "num_hidden_layers",
        "transformers 5 reads num_hidden_layers from the configuration, upstream calls it num_layers",
        "set on the configuration",
    ),
    Shim(
        "all_tied_weights_keys",
        "upstream never calls post_init, so attributes that transformers 5 sets there are missing",
        "set to an empty mapping: lm_head and word_embeddings are stored separately",
    ),
    Shim(
        "absolute imports",
        "some forks import their siblings without a dot, which works only inside their own folder",
        "the folder is on the path while the source is imported, and its modules are forgotten afterwards",
    ),
    Shim(
        "GenerationMixin",
        "transformers 5 warns that a model without GenerationMixin cannot generate",
        "silenced: the workbook never calls generate",
    ),
    Shim(
        "cuda.synchronize",
        "some forks call torch.cuda.synchronize() inside forward, which fails without a GPU",
        "a no-op inside the remote module where torch sees no GPU",
    ),
)


def build_model(
    directory: Path, source: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> tuple[torch.nn.Module, list[Shim]]:
    """Build the model on the meta device from local source files; returns it with the shims that were needed.

    Raises WorkbookError for source that cannot be imported and for source of another model.
    """
    module: Any = import_remote_code(directory, source)
    _check_source(module, source)
    if dtype != torch.float16 and (why := fp16_only(source)):
        raise WorkbookError(f"{why}: take a later modeling_chatglm.py.")
    applied = ["skip_init", "GenerationMixin", "inv_freq"]
    module.skip_init = lambda cls, *args, **kwargs: cls(*args, **kwargs)
    code = read_source(source)
    if re.search(r"^from (configuration_chatglm|quantization) import", code, re.MULTILINE):
        applied.append("absolute imports")
    if not torch.cuda.is_available() and "cuda.synchronize" in code:
        module.torch = _TorchWithoutSynchronize()
        applied.append("cuda.synchronize")
    with in_remote_code():
        # With quantization_bit the source would put its own modules in place, whose kernels run on a GPU alone.
        fields = {k: v for k, v in config.items() if k not in ("transformers_version", "quantization_bit")}
        configuration = module.ChatGLMConfig(**fields)
    if not hasattr(configuration, "num_hidden_layers"):
        configuration.num_hidden_layers = configuration.num_layers
        applied.append("num_hidden_layers")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with in_remote_code(), torch.device("meta"):
            model = getattr(module, MODEL_CLASS)(configuration)
    finally:
        logging.set_verbosity(verbosity)
    if not hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
        applied.append("all_tied_weights_keys")
    model.to(dtype)  # on the meta device this costs nothing; parameters that upstream makes half become dtype
    _compute_inv_freq(model, dtype)
    return model, [shim for shim in SHIMS if shim.name in applied]


def _check_source(module: Any, source: Path) -> None:
    if not (hasattr(module, "ChatGLMConfig") and hasattr(module, MODEL_CLASS)):
        raise WorkbookError(f"{source} defines no {MODEL_CLASS}: it is not the remote code of ChatGLM-6B.")
    inner_model = getattr(module, "ChatGLMModel", getattr(module, MODEL_CLASS))
    if "full_attention_mask" in inspect.signature(inner_model.forward).parameters:
        raise WorkbookError(
            f"{source} takes a full_attention_mask, and an attention_mask of the opposite meaning (VisualGLM, ChatGLM2 "
            "and some branches): take modeling_chatglm.py from the main branch of THUDM/chatglm-6b."
        )


def fp16_only(source: Path) -> str:
    """Why a source runs in fp16 only and cannot be verified, or "": it casts to fp16 in its forward."""
    code = read_source(source)
    with naming(source):
        casts = half_casts(parse_source(code))
    if not casts:
        return ""
    line, cast = casts[0].lineno, ast.unparse(casts[0])[:80]
    return (
        f"{source}, line {line}, casts to fp16 whatever the model's dtype ({cast}), as the first upload of March 2023 "
        "did, so it runs in fp16 only and cannot be verified"
    )


@contextlib.contextmanager
def in_remote_code() -> Iterator[None]:
    """Turn what remote code raises inside the block into one sentence: file, line and kind.

    Errors that pass through no line of remote code stay as they are, and so does want of memory.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # SIGTERM is one, too, and the command line finds it as the cause
        line = remote_line(error)
        if not line or isinstance(error, WorkbookError | MemoryError) or _NO_MEMORY.search(str(error)):
            raise
        raise WorkbookError(
            f"{line}: the remote code fails here ({_kind(error)}): check that line, or take the code and config.json "
            "from one revision of the checkpoint."
        ) from error


def remote_line(error: BaseException) -> str:
    """File and line of the innermost call inside remote code that led to an error, or ""."""
    calls = [
        (Path(frame.f_code.co_filename), number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_globals.get("__loader__"), _SourceLoader)
    ]
    if not calls:
        return ""
    file, number = calls[-1]
    here = Path.cwd()
    return f"{file.relative_to(here) if file.is_relative_to(here) else file}, line {number}"


def _kind(error: BaseException) -> str:
    """Class and first line of an error, without the name that the workbook gives the package."""
    text = _PACKAGE.sub("", str(error).strip()).partition("\n")[0]
    return f"{type(error).__name__}: {shorten(text, 200)}" if text else type(error).__name__


def import_remote_code(directory: Path, source: Path) -> ModuleType:
    """Import `source` as a module of a package of the other files in `directory`, and announce it.

    Nothing but the sources that `code_sha256` covers is run, so bytecode is neither read nor left there.
    """
    package_name = f"glmtrt_remote_{abs(hash(str(directory.resolve()))):x}_{code_sha256(source, directory)[:16]}"
    name = f"{package_name}.modeling_chatglm"
    if name in sys.modules:
        return sys.modules[name]
    announce(source, directory)
    _read_sources_only(directory.resolve())
    package = ModuleType(package_name)
    package.__path__ = [str(directory.resolve())]
    loader = _SourceLoader(name, str(source.parent.resolve() / source.name))
    spec = importlib.util.spec_from_loader(name, loader, origin=str(source))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package_name], sys.modules[name] = package, module
    previous, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    before = set(sys.modules)
    sys.path.insert(0, str(directory.resolve()))  # some forks write `from configuration_chatglm import ...`
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[package_name], sys.modules[name]
        if isinstance(error, WorkbookError):
            raise
        where = remote_line(error) or source
        raise WorkbookError(f"{where}: the import fails ({_kind(error)}): {_advice(error)}.") from error
    finally:
        sys.dont_write_bytecode = previous
        sys.path.remove(str(directory.resolve()))
        for sibling in {path.stem for path in directory.glob("*.py")} & (set(sys.modules) - before):
            del sys.modules[sibling]  # the next checkpoint has siblings of its own
    return module


def _advice(error: BaseException) -> str:
    """What to do where an import of remote code has failed."""
    missing, owner = isinstance(error, ModuleNotFoundError), getattr(error, "obj", None)  # of an AttributeError
    name = (error.name if isinstance(error, ImportError) else owner.__name__ if inspect.ismodule(owner) else "") or ""
    top = name.partition(".")[0]
    if _PACKAGE.match(f"{name}.") or top.endswith("_chatglm") or top == "quantization" or "relative" in str(error):
        file = f"{_PACKAGE.sub('', name)}.py, or the folder of that name," if missing else "what it names"
        return f"{file} is part of the same remote code: copy it here from where the checkpoint came, of one revision"
    if missing and "." not in name:
        return f"install it with `pip install {top}`, or copy it here if it is a package of the same fork"
    if top:
        return (
            f"this fork was written for another release of {_release(top)}, which has no such name; take a fork that "
            "was made for a later one, or remove the import where the name is not used"
        )
    return "take modeling_chatglm.py and configuration_chatglm.py from one revision of the checkpoint"


def _release(package: str) -> str:
    """A package and its version as part of a sentence."""
    if package in sys.stdlib_module_names:
        return f"Python than {platform.python_version()}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} than {importlib.metadata.version(package)}"
    return f"{package} than the one here"


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source itself: bytecode beside it may be other code."""

    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.get_filename(fullname))
        if path.parent.resolve() != path.parent:
            raise ImportError(f"{path} lies outside the checkpoint's folder, behind a symbolic link")
        source = read_source(path)
        with naming(path):
            parse_source(source)
        return self.source_to_code(source.encode(), str(path))


def _read_sources_only(directory: Path) -> None:
    """From now on modules in `directory` and below come from their sources only."""

    def finder(folder: str) -> importlib.machinery.FileFinder:
        if not Path(folder).is_relative_to(directory):
            raise ImportError
        return importlib.machinery.FileFinder(folder, (_SourceLoader, importlib.machinery.SOURCE_SUFFIXES))

    sys.path_hooks.insert(0, finder)
    for folder in [folder for folder in sys.path_importer_cache if Path(folder).is_relative_to(directory)]:
        del sys.path_importer_cache[folder]


def inv_freq(rotary: int) -> torch.Tensor:
    """What upstream stores for one layer, (rotary / 2,) fp16; rotary: the half of a head that one position rotates."""
    return (1.0 / 10000 ** (torch.arange(0, rotary, 2).float() / rotary)).half()


def _compute_inv_freq(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        stored = getattr(module, "inv_freq", None)
        if isinstance(stored, torch.nn.Parameter):
            module.inv_freq = torch.nn.Parameter(inv_freq(2 * stored.numel()).to(dtype), requires_grad=False)
        elif isinstance(stored, torch.Tensor):
            module.inv_freq = inv_freq(2 * stored.numel()).to(dtype)


class _TorchWithoutSynchronize:
    """The name `torch` inside one remote module: everything torch has, with a cuda.synchronize that does nothing."""

    class _Cuda:
        def __getattr__(self, name: str) -> Any:
            return (lambda *args, **kwargs: None) if name == "synchronize" else getattr(torch.cuda, name)

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
