"""FLOPs and bytes of a training step's parts, and the time they take at the least: computed, never measured.

A step is the paper's 131,072 tokens, cut into windows of the context length. Bytes are what must cross the memory bus
when every tensor of an operation is read or written once: a lower bound, like the times at a device's peaks.
roofline.py writes what follows from them.

Letters: N tokens of a step, s context, M width, H query heads, G KV heads, D head dim, E padded head dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

STEP_TOKENS = 131_072
MICRO_TOKENS = 16_384
"""Tokens of a micro-batch, where a window is not longer: weights are read and gradients accumulated once for each."""
CONTEXTS = tuple(1024 << i for i in range(8))
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Device:
    """Peaks from the vendor's data sheets: dense bf16, float32 without tensor cores, and memory."""

    flops: float
    flops_float32: float
    bytes: float


DEVICES = {
    "H100 SXM": Device(989e12, 67e12, 3.35e12),
    "A100 SXM 80 GB": Device(312e12, 19.5e12, 2.039e12),
}


@dataclass(frozen=True)
class Model:
    """A decoder with grouped queries and a gated MLP."""

    layers: int
    width: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool = True
    qkv_bias: bool = True
    routers: int = 4
    router_dim: int = 64

    @property
    def projections(self) -> int:
        """Weights of q, k, v and o in a layer."""
        return self.width * self.head_dim * (2 * self.heads + 2 * self.groups)

    @property
    def mlp(self) -> int:
        return 3 * self.width * self.ffn

    @property
    def parameters(self) -> int:
        bias = self.qkv_bias * self.head_dim * (self.heads + 2 * self.groups)
        layer = self.projections + bias + self.mlp + 2 * self.width
        return self.layers * layer + (2 - self.tied) * self.width * self.vocabulary + self.width

    @property
    def padded(self) -> tuple[int, int]:
        """Head dim with the columns of gates in bf16 (kernels/attention/gated_function.py): as stored, and as a kernel computes it.

        Stored: a multiple of 8. Computed: rounded as flash-attn's tiles are, to 32, above 128 to 64.
        """
        stored = -(-(self.head_dim + 3) // 8) * 8
        tile = 32 if stored <= 128 else 64
        return stored, -(-stored // tile) * tile


MODELS = {
    "Qwen2.5-0.5B": Model(24, 896, 14, 2, 64, 4864, 151_936),
    "Qwen2.5-1.5B": Model(28, 1536, 12, 2, 128, 8960, 151_936),
    "Qwen2.5-7B": Model(28, 3584, 28, 4, 128, 18944, 152_064, tied=False),
    "SmolLM2-135M": Model(30, 576, 9, 3, 64, 1536, 49_152, qkv_bias=False),
}
PUBLISHED = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
"""Those whose tables the page shows; the last serves the comparison with measured shares."""


@dataclass
class Part:
    """Work of one part in a step."""

    flops: float
    bytes: float
    float32: bool = False
    """Computed in float32 (torch's default: no TF32), else in bf16 on tensor cores."""

    def seconds(self, device: Device) -> float:
        """At the device's peaks: the longer of computing and moving."""
        peak = device.flops_float32 if self.float32 else device.flops
        return max(self.flops / peak, self.bytes / device.bytes)


def attention(m: Model, s: int, N: int, dims: int, computed: int) -> Part:
    """Causal attention of all layers, once: forward q·kᵀ and p·v; backward s, dq, dk (width of q) and dp, dv (of v)."""
    flops = 2 * (N * s / 2) * m.heads * (2 * computed + 5 * computed)
    q, kv, lse = N * m.heads * dims, N * m.groups * dims, N * m.heads * FP32
    forward = BF16 * (q + 2 * kv + q) + lse
    backward = BF16 * (3 * q + 2 * kv + q + 2 * kv) + lse  # q, o, do, k, v in; dq, dk, dv out
    return Part(m.layers * flops, m.layers * (forward + backward))


def gates(m: Model, N: int) -> Part:
    """What surrounds the kernel: the kernels of kernels/attention/columns_triton.py, each reading and writing its tensors once."""
    E = m.padded[0]
    q, kv = N * m.heads * m.head_dim, N * m.groups * m.head_dim
    wide_q, wide_kv = N * m.heads * E, N * m.groups * E
    columns = (q + wide_q) + (2 * kv + 2 * wide_kv)  # q', k' and v', in forward and again in backward
    merged = q + 2 * kv + q + q  # q, k, v and the kernel's o in, o out
    gradient = 2 * q + wide_q  # do and o in, do' out
    own = 2 * q + 2 * kv + q + 2 * kv + q + 2 * kv  # do, q, k, v and the call's gradients in, dq, dk, dv out
    elements = q + 2 * kv
    return Part(m.layers * 20 * elements, m.layers * BF16 * (2 * columns + merged + gradient + 2 * kv + own))


def linear(weights: float, inputs: float, outputs: float, N: int, micro: float, item: int = BF16) -> Part:
    """Matrix products forward and backward; gradients are accumulated in float32 for each micro-batch."""
    moved = N * item * (inputs + outputs) + N * item * (2 * outputs + 2 * inputs)
    return Part(6 * N * weights, moved + micro * weights * (2 * item + 2 * FP32))


def router(m: Model, N: int, micro: float) -> Part:
    """Routers in float32: five projections, and linear attention in chunks of 128."""
    R, C = m.router_dim, 128
    out = linear(4 * m.width * R + m.width**2, 5 * m.width, 4 * R + m.width, N, micro, FP32)
    out.flops += 3 * N * 2 * (C * R + C * (R + 1) + 2 * R * (R + 1))
    return Part(m.routers * out.flops, m.routers * out.bytes, float32=True)


LOSS_MEMORY_MIB = 2048
"""kernels.losses.token_loss.LOSS_MEMORY_MIB on a GPU."""


def logit_bytes(passes: int, triton: bool) -> int:
    """Bytes that cross the memory bus for one logit of each pass, the products' own included."""
    products = passes * (BF16 + 2 * BF16)  # written by one, read by two
    if triton:  # kernels/losses/row_losses_triton.py: read; read and written
        return products + passes * (BF16 + 2 * BF16)
    # kernels/losses/row_losses.py, operation by operation: widened, its maximum, less the maximum, exp, its sum, times a number,
    # narrowed.
    each = (BF16 + FP32) + FP32 + 2 * FP32 + 2 * FP32 + FP32 + 2 * FP32 + (FP32 + BF16)
    # Of a pair: gap = x − y; gap·p and its sum; q − p.
    pair = 3 * FP32 + (3 * FP32 + FP32) + 3 * FP32
    return products + passes * each + (passes == 2) * pair


def loss(m: Model, N: int, passes: int, memory_mib: int = LOSS_MEMORY_MIB, triton: bool = True) -> Part:
    """Logits, CE (and KL) and their gradients in one sweep of kernels/losses/token_loss.py."""
    V, M = m.vocabulary, m.width
    # Bytes of a row in a chunk of that memory, as kernels/losses/token_sweep.py counts them on a GPU.
    row = V * passes * BF16 if triton else V * (passes * (FP32 + BF16) + (passes == 2) * FP32)
    rows = min(max(memory_mib * 2**20 // row, 1), N)
    chunks = N / rows
    weight = V * M * (2 * BF16 + 2 * BF16 + 2 * FP32)  # read twice; a chunk's product; its float32 sum
    logits = V * logit_bytes(passes, triton)
    return Part(6 * N * passes * M * V, chunks * weight + N * logits + 3 * N * passes * M * BF16)


def optimizer(m: Model) -> Part:
    """Adam: float32 gradient in; master weight and two moments in and out; bf16 weight out."""
    return Part(15 * m.parameters, m.parameters * (FP32 + 6 * FP32 + BF16))


def parts(m: Model, s: int, kvcat: bool = True, N: int = STEP_TOKENS) -> dict[str, Part]:
    """The parts of a step: KV-CAT's two passes, or a plain one."""
    passes = 1 + kvcat
    micro = N / min(max(s, MICRO_TOKENS), N)
    # norms, residuals, rotary embedding and SwiGLU, forward and twice that backward
    elements = 3 * (10 * m.width + 2 * (m.heads + m.groups) * m.head_dim + 3 * m.ffn)
    inputs, outputs = m.width + m.heads * m.head_dim, (m.heads + 2 * m.groups) * m.head_dim + m.width
    projections = linear(m.projections, inputs, outputs, N * passes, micro)
    mlp = linear(m.mlp, m.width + m.ffn, 2 * m.ffn + m.width, N * passes, micro)
    out = {"attention, dense": attention(m, s, N, m.head_dim, m.head_dim)}
    if kvcat:
        out["attention, gated"] = attention(m, s, N, *m.padded)
        out["columns of the gates"] = gates(m, N)
    out["projections"] = Part(m.layers * projections.flops, m.layers * projections.bytes)
    out["MLP"] = Part(m.layers * mlp.flops, m.layers * mlp.bytes)
    out["norms, rotary, SwiGLU"] = Part(
        m.layers * N * passes * elements, m.layers * N * passes * elements * BF16
    )
    if kvcat:
        out["routers"] = router(m, N, micro)
    out["CE + KL" if kvcat else "CE"] = loss(m, N, passes)
    out["optimizer"] = optimizer(m)
    return out


def rows() -> list[dict]:
    """Every model, context, form and part."""
    out = []
    for name, m in MODELS.items():
        for s in CONTEXTS:
            for form in ("kvcat", "plain"):
                for part, work in parts(m, s, form == "kvcat").items():
                    seconds = {device: work.seconds(d) for device, d in DEVICES.items()}
                    out.append(
                        {
                            "model": name,
                            "context": s,
                            "form": form,
                            "part": part,
                            **asdict(work),
                            "seconds": seconds,
                        }
                    )
    return out


def result() -> dict:
    """What benchmarks/roofline.json holds."""
    return {
        "claim": "computed from shapes and data sheets, never measured",
        "tokens_per_step": STEP_TOKENS,
        "tokens_per_micro_batch": MICRO_TOKENS,
        "devices": {name: asdict(d) for name, d in DEVICES.items()},
        "models": {name: asdict(m) | {"parameters": m.parameters} for name, m in MODELS.items()},
        "rows": rows(),
    }
