# ruff: noqa
# Written by tests/apis/extract.py from torch_tensorrt-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl
# sha256 91b0cc45e4c1d7612b31a556116f01868393c3d7fdec97c6a703aef74335911c
from typing import Any
from torch_tensorrt import dynamo as dynamo, runtime as runtime

__version__: str

def save(
    module: Any,
    file_path: Any = ...,
    *,
    extra_files: Any = ...,
    output_format: Any = ...,
    inputs: Any = ...,
    arg_inputs: Any = ...,
    kwarg_inputs: Any = ...,
    retrace: Any = ...,
    use_legacy_exporter: Any = ...,
    pickle_protocol: Any = ...,
    dynamic_shapes: Any = ...,
) -> Any: ...
def load(file_path: Any = ..., extra_files: Any = ...) -> Any: ...

class Input:
    def __init__(
        self,
        *args: Any,
        shape_ranges: Any = ...,
        shape: Any = ...,
        min_shape: Any = ...,
        opt_shape: Any = ...,
        max_shape: Any = ...,
        shared_dims: Any = ...,
        dtype: Any = ...,
        is_shape_tensor: Any = ...,
        format: Any = ...,
        tensor_domain: Any = ...,
        torch_tensor: Any = ...,
        name: Any = ...,
    ) -> None: ...

class Device:
    def __init__(
        self, *args: Any, dla_core: Any = ..., gpu_id: Any = ..., allow_gpu_fallback: Any = ..., device_type: Any = ...
    ) -> None: ...
