"""Backend `tvm_cuda`: TVM for NVIDIA GPUs, one shared library whose kernels run on the GPU.

``arch`` of a row is a compute capability: ``sm90``. On a machine without a GPU the library gets CUDA source, which is
compiled as the engine is loaded; on one with a GPU, and NVRTC, it gets machine code.

Options of a row:
    import: ``onnx`` (default) or ``program``: which artifact it reads.
    cpu: LLVM processor for what runs beside the GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import gpu, host
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, unknown
from pipeline.store import write_json
from pipeline.tvm import cuda as tvm_cuda
from pipeline.tvm import importer as tvm_import
from pipeline.tvm import link as tvm_link
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

SOURCES = ("onnx", "program")
CPUS = {"x86_64": "x86-64-v3", "aarch64": "cortex-a72"}
RUNTIME = "libtvm_runtime_cuda.so"
NEEDS = {
    "machine code": f"{RUNTIME} of the same wheel, CUDA 13 (libcudart.so.13)",
    "source": f"{RUNTIME} of the same wheel, CUDA 13 (libcudart.so.13), and NVRTC with CUDA's headers",
}


class TvmCuda:
    """See `pipeline.types.Backend`. Its engine is ``model.so``."""

    name = "tvm_cuda"
    option_names = frozenset({"import", "cpu"})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:
        """As the option `import` says."""
        return "program" if target.options.get("import") == "program" else "onnx"

    def missing(self, target: Target) -> str | None:
        """The package, or a linker for the row's machine; for ``arch = "native"`` the GPU that it stands for."""
        if target.arch == gpu.NATIVE and gpu.absent() is not None:
            return f'{gpu.absent()} (arch = "native" is for the GPU that builds it)'
        return host.absent("tvm", "apache-tvm", "tvm") or tvm_link.missing(target)

    def not_runnable(self, target: Target) -> str | None:
        """The row's GPU, the package, or NVRTC."""
        return gpu.unfit(target) or host.absent("tvm", "apache-tvm", "tvm") or tvm_cuda.lacks_nvrtc()

    def tools(self, target: Target) -> Mapping[str, str]:
        """Versions of TVM, the linker, and of NVRTC where it takes part in the build."""
        found, linker = host.versions(["apache-tvm"]), tvm_link.linker(target)
        if linker is not None:
            found["linker"] = linker.version
        if _compiles_here():
            found |= host.versions(["nvidia-cuda-nvrtc"]) | {"code": "machine code"}
        return found | ({"gpu": _arch(target)} if target.arch == gpu.NATIVE else {})

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Import, schedule by TVM's own rules for GPUs, compile, link.

        Raises:
            UsageError: an option, or `arch`, has a value that doesn't exist.
            UnavailableError: there is no linker.
            BuildError: an operator can't be imported or compiled.
        """
        _check(target)
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        import tvm
        from tvm import relax

        from pipeline.tvm.passes import sorted_shape_functions

        real = target.model_copy(update={"arch": _arch(target)})
        where = tvm_cuda.compiles_for(real, _cpu(target))
        module = tvm_import.imported(model, target, self.source(target))
        ways = tvm_cuda.exact(str(where.arch)) if _compiles_here() else contextlib.nullcontext()
        try:
            with ways, where, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lowering = tvm.transform.Sequential([relax.get_default_pipeline(where), sorted_shape_functions()])
                executable = tvm.compile(module, target=where, relax_pipeline=lowering)
        except BuildError:
            raise
        except Exception as error:  # TVM's passes raise everything from TypeError to their own
            raise BuildError(
                f"tvm can't compile the model for `{target.name}`: {tvm_import.plain(error)}",
                hint='the other way in (option `import = "program"` or `"onnx"`) may do better',
            ) from error
        kernels = tvm_cuda.source_of(executable).count("__global__")
        tvm_link.write(executable, target, out)
        code = "machine code" if _compiles_here() else "source"
        needs = tvm_link.needs_of(target) | {"gpu": NEEDS[code]}
        write_json(out / tvm_link.RUNTIME, needs)
        return {"code": code, "kernels": kernels, "runtime": needs}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """Relax's virtual machine on the GPU; feeds and outputs are copied there and back at each call.

        Raises:
            BuildError: the file is broken, or was built by another version of TVM.
            UnavailableError: this host lacks the GPU, TVM's part for it, or NVRTC.
        """
        _check(target)
        reason = self.not_runnable(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
        import tvm
        from tvm import relax

        device, path, signature = tvm.cuda(0), engine.file(tvm_link.LIBRARY), engine.signature()
        if not device.exist:
            raise UnavailableError(f"`{target.name}`: TVM can't use the GPU", hint=f"see what `{RUNTIME}` lacks (ldd)")
        with tvm_cuda.exact(_arch(target).replace("sm", "sm_")):
            try:
                machine: Any = relax.VirtualMachine(tvm.runtime.load_module(str(path)), device)
                main = machine["main"]
            except Exception as error:  # the loader's own, an AttributeError for a library that isn't TVM's ...
                raise BuildError(
                    f"tvm can't load the engine `{path}`: {tvm_import.plain(error)}",
                    hint="`exportyard export` builds it again",
                ) from error

            def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
                found = main(*(tvm.runtime.tensor(feeds[spec.name], device) for spec in signature.inputs))
                arrays = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
                return {spec.name: array.numpy() for spec, array in zip(signature.outputs, arrays, strict=True)}

            yield checked(run, signature)


def _check(target: Target) -> None:
    source = target.options.get("import", "onnx")
    if source not in SOURCES:
        raise unknown("value of `import`", str(source), SOURCES, where=f"target `{target.name}`")
    if target.arch != gpu.NATIVE and gpu.capability_of(target.arch) is None:
        raise UsageError(
            f"target `{target.name}`: `{target.arch}` is no compute capability", hint='write it as `arch = "sm90"`'
        )


def _arch(target: Target) -> str:
    """The compute capability that `target` means; ``native`` where there is no GPU to ask."""
    here = gpu.found()
    return here.arch if target.arch == gpu.NATIVE and here is not None else target.arch


def _cpu(target: Target) -> str:
    return str(target.options.get("cpu", CPUS.get(target.machine, "generic")))


def _compiles_here() -> bool:
    """Whether TVM's build makes machine code: only where it can load its runtime for GPUs."""
    return gpu.found() is not None and tvm_cuda.lacks_nvrtc() is None


BACKEND = TvmCuda()
