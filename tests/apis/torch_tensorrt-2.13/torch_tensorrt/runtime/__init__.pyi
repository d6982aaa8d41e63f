# ruff: noqa
# Written by tests/apis/extract.py from torch_tensorrt-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl
# sha256 91b0cc45e4c1d7612b31a556116f01868393c3d7fdec97c6a703aef74335911c
from typing import Any

def enable_cudagraphs(compiled_module: Any, *, cuda_graph_strategy: Any = ...) -> Any: ...
