"""A catalogue of tiny models, each with what capture and conversion must make of it: the known troublemakers.

Every entry is a recipe in small. `Fails` entries say which error, and what its message must say.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CaptureError, ConversionError, ExportyardError

BATCH = {"batch": {"min": 1, "opt": 4, "max": 19}}
SEQ = {"seq": {"min": 1, "opt": 6, "max": 17}}


@dataclass(frozen=True)
class Entry:
    """One model: `inputs` as (name, dtype, shape, range), `outputs` as names."""

    name: str
    model: type[nn.Module]
    inputs: list[tuple]
    outputs: list[str]
    axes: dict = field(default_factory=lambda: BATCH)
    fails: type[ExportyardError] | None = None
    match: str = ""
    shapes: dict = field(default_factory=dict)  # what the signature says of an output, where it is worth a check
    translations: bool = False


CATALOGUE: list[Entry] = []


def entry(inputs, outputs=("out",), axes=None, fails=None, match="", shapes=None, translations=False):
    def register(model):
        name = model.__name__
        axes_of = BATCH if axes is None else axes
        CATALOGUE.append(
            Entry(name, model, list(inputs), list(outputs), axes_of, fails, match, shapes or {}, translations)
        )
        return model

    return register


def x(*shape, dtype="float32", span=(-2.0, 2.0), name="x"):
    return (name, dtype, list(shape), list(span))


# data flow that a tracer finds hard


@entry([x("batch", 3)], fails=CaptureError, match=r"depends on a tensor's values[\s\S]*torch\.where")
class BranchOnData(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


@entry([x("batch", 3)], fails=CaptureError, match=r"\(2 places\)[\s\S]*models\.py:\d+: if x\.mean")
class BranchesOnData(nn.Module):
    def forward(self, x):
        if x.mean().item() > 0.5:
            x = x + 1
        if x.amax().item() > 0.5:
            x = x - 1
        return x


@entry([x("batch", 3)], fails=CaptureError, match=r"is not the model at batch = \d+[\s\S]*models\.py:\d+: if x\.shape")
class BranchOnOddSize(nn.Module):
    def forward(self, x):
        if x.shape[0] % 2:
            return x + 1
        return x - 1


@entry(
    [x("batch", 3)], fails=CaptureError, match=r"axis `batch`.*only at sizes 1 to 8.*1 to 19[\s\S]*models\.py:\d+: if"
)
class BranchOnLargeSize(nn.Module):
    def forward(self, x):
        if x.shape[0] > 8:
            return x * 2
        return x


@entry([x("batch", 3)], fails=CaptureError, match=r"axis `batch`.*fixes it at 4[\s\S]*models\.py:\d+: sizes")
class SpecializedAxis(nn.Module):
    def forward(self, x):
        sizes = [float(row) for row in range(x.shape[0])]
        return x + torch.tensor(sizes)[:, None]


@entry([x("batch", "seq")], axes=BATCH | SEQ, fails=CaptureError, match=r"fails at batch = 1, seq = 1[\s\S]*models\.py")
class FixedReshape(nn.Module):
    def forward(self, x):
        return x.reshape(4, -1)


@entry(
    [x("batch", 3), x("seq", 3, name="y")],
    axes=BATCH | SEQ,
    fails=CaptureError,
    match=r"models\.py:\d+: return x \+ y[\s\S]*\(batch\) must match.*\(seq\)",
)
class TiedAxes(nn.Module):
    def forward(self, x, y):
        return x + y


@entry([x("seq")], axes=SEQ, fails=CaptureError, match=r"fails at seq = 11[\s\S]*models\.py")
class ShortTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x + self.table[: x.shape[0]]


@entry([x("batch", 3)], fails=CaptureError, match=r"answers differently each time")
class AlwaysRandom(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


@entry([x("batch", 3)], fails=CaptureError, match=r"writes its buffer `calls`")
class KeepsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


@entry([x("batch", 3)], fails=CaptureError, match=r"returns 2 outputs \(float32 \[1, 3\], float32 \[1\]\).* names 1")
class TooManyOutputs(nn.Module):
    def forward(self, x):
        return x, x.sum(-1)


@entry([x("batch", 3)], fails=CaptureError, match=r"returns a float")
class NumberOutput(nn.Module):
    def forward(self, x):
        return x.sum().item()


@entry([x("batch", 3)], fails=CaptureError, match=r"tensor of complex64")
class ComplexOutput(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


@entry([x(3, 3)], axes={}, fails=ConversionError, match=r"operator `aten::\w+` has no ONNX form[\s\S]*models\.py:\d+: ")
class Unsupported(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.T)


@entry([x("batch", 3)])
class InPlaceViews(nn.Module):
    def forward(self, x):
        y = x.clone()
        y[:, 1] += 1
        y[:, :2].mul_(3)
        y.view(-1)[0] = 7
        return y


@entry([x("batch", 3)])
class WritesItsInput(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


@entry([x("batch", 3)], outputs=["picked", "where"], shapes={"picked": ["batch", 2]})
class TopK(nn.Module):
    def forward(self, x):
        return x.topk(2)


@entry([x("batch", 3)], shapes={"out": ["data_0", 2]})
class NonZero(nn.Module):
    def forward(self, x):
        return (x > 0).nonzero()


@entry([x("batch", 3)])
class Cond(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a - 1, (x,))


@entry([x("batch", 3)])
class Where(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, torch.exp(x))


# inputs and outputs of every form


@entry([x("batch", 3)], outputs=["a", "b", "c"])
class NestedOutputs(nn.Module):
    def forward(self, x):
        return {"first": x + 1, "rest": [(x * 2,), None, {"deep": x.sum(-1)}]}


@entry([x("batch", 3)], outputs=["high", "low"])
class DictByName(nn.Module):
    def forward(self, x):
        return {"low": x - 1, "high": x + 1}


@dataclasses.dataclass
class Pair:
    first: Tensor
    absent: Tensor | None
    second: Tensor


@entry([x("batch", 3)], outputs=["first", "second"])
class DataclassOutput(nn.Module):
    def forward(self, x):
        return Pair(x + 1, None, x.relu())


@entry([x("batch", 3)], outputs=["same", "again", "twice", "once"])
class AliasedOutputs(nn.Module):
    def forward(self, x):
        y = x * 2
        return x, x, y, y


@entry([x("batch", 3)], outputs=["out", "table"], shapes={"table": [3]})
class ConstantOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x):
        return x + 1, torch.tensor([1, 2, 3])


@entry([x("batch", 3)], outputs=["out", "weight"])
class WeightAsOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x):
        return x + self.weight, self.weight


@entry([x("batch", 3), x("batch", 5, name="unused"), x(dtype="int64", span=(0, 3), name="spare")])
class UnusedInput(nn.Module):
    def forward(self, x, unused, spare):
        return x.tanh()


@entry([x("batch", 3), x(name="scale")], outputs=["out", "total"], shapes={"total": []})
class ScalarInput(nn.Module):
    def forward(self, x, scale):
        return x * scale, x.sum() * scale


@entry(
    [x("batch", 4, dtype="int64", span=(0, 9), name="ids"), x("batch", 4, dtype="bool", span=(0, 1), name="mask")],
    outputs=["mean", "kept", "any"],
)
class IntAndBool(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6, padding_idx=0)

    def forward(self, ids, mask):
        rows = self.table(ids) * mask[..., None]
        return rows.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), torch.where(mask, ids, -1), mask.any(1)


@entry([x("batch", 2, 3, 4, 5)], shapes={"out": ["batch", 120]})
class FiveDimensions(nn.Module):
    def forward(self, x):
        return x.permute(0, 4, 1, 3, 2).flatten(1).sigmoid()


@entry([x("batch", 3, name="linear")], outputs=["relu", "add", "linear_1"])
class NamesCollide(nn.Module):
    """The graph has values called linear, linear_1, relu and add of its own, and they aren't these."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Linear(4, 3)

    def forward(self, linear):
        relu = self.one(linear).relu()
        add = relu + 1
        return self.two(add), add, relu


@entry([x("batch", "seq")], axes=BATCH | SEQ, shapes={"out": ["2*batch*seq"]})
class DerivedSizes(nn.Module):
    def forward(self, x):
        return torch.cat([x, x + 1]).view(-1)


@entry([x("batch", 3)], outputs=["out"])
class NoParameters(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


# layers


@entry([x("batch", 3, 8, 8)])
class ConvBatchNorm(nn.Module):
    """Folding the norm must use the convolution's own bias, once, also where weights have the same values."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.next = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        for norm in (self.norm, self.norm2):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.last(self.norm2(self.next(x)).relu())


@entry(
    [x("batch", 4, "height", "width")], axes=BATCH | {n: {"min": 8, "opt": 12, "max": 21} for n in ("height", "width")}
)
class ConvKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding="same")
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        return self.norm(self.up(self.depthwise(self.grouped(x)).relu()))


@entry([x("batch", 2, "seq")], axes=BATCH | {"seq": {"min": 4, "opt": 9, "max": 30}}, shapes={"out": ["batch", 3]})
class ConvOneDimension(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 4)

    def forward(self, x):
        return F.adaptive_avg_pool1d(self.conv(x), 1).squeeze(-1)


@entry([x("batch", 1, "side", "side")], axes=BATCH | {"side": {"min": 6, "opt": 8, "max": 13}})
class Pools(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(F.max_pool2d(x, 2, ceil_mode=True), 3, stride=1, padding=1)


@entry([x("batch", 5, 3)], shapes={"out": ["batch", 8]})
class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


@entry(
    [x("batch", "seq", 3)],
    axes=BATCH | SEQ,
    fails=CaptureError,
    match=r"axis `seq`.*fixes it at 6[\s\S]*min = opt = max",
)
class LstmOverAxis(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@entry(
    [x("batch", "seq", 8), x("batch", "seq", dtype="bool", span=(0, 1), name="mask")],
    axes=BATCH | SEQ,
    shapes={"out": ["batch", "seq", 8]},
)
class MaskedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, 2, 4).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        allowed = mask[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return x + mixed.transpose(1, 2).reshape(batch, length, 8)


@entry([x("batch", 16, 8)])
class WindowsWithLearnedBias(nn.Module):
    """Attention in windows, as in Swin: the exporter lays its result out for one kernel and writes down another."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4))

    def forward(self, x):
        windows = x.reshape(-1, 4, 8)
        count = windows.shape[0]
        q, k, v = (part.reshape(count, 4, 2, 4).transpose(1, 2) for part in self.qkv(windows).chunk(3, -1))
        bias = self.bias.expand(count, 2, 4, 4).contiguous()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return mixed.transpose(1, 2).contiguous().reshape(count, 4, 8).reshape(x.shape)


@entry([x("batch", "seq", 8)], axes=BATCH | SEQ)
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x):
        return self.layer(x)


@entry([x("batch", 4, dtype="int64", span=(0, 9), name="ids")])
class SharedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


@entry([x("batch", 3)])
class BufferNotSaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return x + self.offset


@entry([x("batch", 3, dtype="float16")])
class HalfPrecision(nn.Module):
    def forward(self, x):
        return x * 2 + 1


@torch.library.custom_op("catalogue::twice_plus", mutates_args=())
def twice_plus(x: Tensor, bias: float) -> Tensor:
    return torch.from_numpy(np.asarray(x) * 2) + bias


@twice_plus.register_fake
def _(x, bias):
    return torch.empty_like(x)


def translations():
    from onnxscript import opset20 as op

    def twice_plus(x, bias: float):
        two = op.CastLike(op.Constant(value_float=2.0), x)
        return op.Add(op.Mul(x, two), op.CastLike(op.Constant(value_float=bias), x))

    return {"catalogue::twice_plus": twice_plus}


@entry([x("batch", 3)], translations=True)
class CustomOperator(nn.Module):
    def forward(self, x):
        return twice_plus(x, 0.5).relu()


@entry([x("batch", 3)], fails=ConversionError, match=r"operator `catalogue::twice_plus`.*[\s\S]*translations")
class CustomWithoutTranslation(nn.Module):
    def forward(self, x):
        return twice_plus(x, 0.5)
