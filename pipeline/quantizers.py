"""PT2E quantizers: which operators of a program a backend runs in INT8, and with which kinds of scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline import host
from pipeline.errors import UnavailableError, UsageError, unknown
from pipeline.types import Scheme

Reach = Literal["everything", "products"]
DYNAMIC: Scheme = "int8-dynamic"


def make(name: str, scheme: Scheme, reach: Reach) -> Any:
    """The quantizer `name` for `scheme`.

    Args:
        name: ``xnnpack`` (ExecuTorch's), ``litert`` (the same rules, without ExecuTorch) or ``inductor``.
        scheme: with its activations and weights.
        reach: whether it takes in everything that it can, or what has weights only.

    Raises:
        UsageError: there is no such quantizer, or it doesn't have the scheme.
        UnavailableError: a package is missing.
    """
    reaches(name, scheme)
    for module, package, extra in (("torchao", "torchao", "pt2e"), *_NEEDS.get(name, ())):
        reason = host.absent(module, package, extra)
        if reason is not None:
            raise UnavailableError(reason)
    return _MAKERS[name](scheme, reach)


def reaches(name: str, scheme: Scheme) -> tuple[Reach, ...]:
    """How far a form may reach, in the order in which that is tried.

    Raises:
        UsageError: there is no such quantizer, or it doesn't have the scheme.
    """
    if name not in SCHEMES:
        raise unknown("quantizer", name, SCHEMES)
    if scheme not in SCHEMES[name]:
        raise UsageError(
            f"quantizer `{name}` has no `{scheme}`", hint=f"it has {', '.join(f'`{one}`' for one in SCHEMES[name])}"
        )
    return ("products",) if scheme == DYNAMIC or name == "inductor" else ("everything", "products")


def folds(name: str) -> bool:
    """Whether weights are kept as integers; LiteRT's converter wants them in float, and their scales beside them."""
    return name != "litert"


def _xnnpack(scheme: Scheme, reach: Reach) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as library

    taken = _taken(scheme, reach)

    class Quantizer(library.XNNPACKQuantizer):  # type: ignore[misc]
        SUPPORTED_PATTERNS = [one for one in library.XNNPACKQuantizer.SUPPORTED_PATTERNS if taken(one.name)]  # noqa: RUF012
        transform_for_annotation = _as_it_is

    return _symmetric(Quantizer(), library, scheme)


def _litert(scheme: Scheme, reach: Reach) -> Any:
    from torchao.testing.pt2e import _xnnpack_quantizer as library  # an older copy of it, without ExecuTorch

    taken = _taken(scheme, reach)

    class Quantizer(library.XNNPACKQuantizer):  # type: ignore[misc]
        STATIC_OPS = [one for one in library.XNNPACKQuantizer.STATIC_OPS if taken(one)]  # noqa: RUF012
        transform_for_annotation = _as_it_is

    return _symmetric(Quantizer(), library, scheme)


def _as_it_is(_: Any, model: Any) -> Any:
    """No rewrite before annotation: the library would turn integers that are added to indices into floats."""
    return model


def _taken(scheme: Scheme, reach: Reach) -> Callable[[str], bool]:
    """Which of the library's patterns are looked for."""
    products = ("linear",) if scheme == DYNAMIC else ("linear", "linear_relu", "conv", "conv_relu")
    return lambda pattern: reach == "everything" or pattern in products


def _symmetric(chooser: Any, library: Any, scheme: Scheme) -> Any:
    settings = library.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=scheme == DYNAMIC)
    return chooser.set_global(settings)


def _inductor(scheme: Scheme, reach: Reach) -> Any:
    del reach
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as library

    settings = library.get_default_x86_inductor_quantization_config(is_dynamic=scheme == DYNAMIC)
    return library.X86InductorQuantizer().set_global(settings)


_MAKERS: Mapping[str, Callable[[Scheme, Reach], Any]] = {
    "xnnpack": _xnnpack,
    "litert": _litert,
    "inductor": _inductor,
}
_NEEDS = {"xnnpack": (("executorch", "executorch", "executorch"),)}
SCHEMES: Mapping[str, tuple[Scheme, ...]] = {
    "xnnpack": ("int8-s8s8", DYNAMIC),
    "litert": ("int8-s8s8",),
    "inductor": ("int8-u8s8", DYNAMIC),
}
