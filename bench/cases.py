"""The shapes that are measured: real vocabularies and widths, as many rows as a size class affords."""

from dataclasses import dataclass
from typing import Literal

import torch

# "ci": seconds on two cores, and what the gates are taken on. "full": with the former, `make bench`. "gpu": the
# reference shape of the kernels' targets.
Size = Literal["ci", "full", "gpu"]
FamilyName = Literal[
    "topk",
    "support",
    "gather",
    "kl",
    "exact_head",
    "exact_head_zero_sum",
    "exact_head_frozen",
    "sampled_head",
    "linear_topk",
    "linear_gather",
]

LOGPROB_BYTES, ID_BYTES = 4, 8  # fp32 scores, int64 ids


@dataclass(frozen=True, slots=True)
class Model:
    """What a benchmark needs to know of a language model: the head is [vocab, width]."""

    name: str
    vocab: int
    width: int


EMBEDDED = Model("embedded student", 540, 96)
QWEN3_06B = Model("Qwen3 0.6B", 151_936, 1024)
QWEN3_17B = Model("Qwen3 1.7B", 151_936, 2048)
QWEN3_4B = Model("Qwen3 4B", 151_936, 2560)
QWEN3_8B = Model("Qwen3 8B", 151_936, 4096)
LLAMA3_8B = Model("Llama 3 8B", 128_256, 4096)
GEMMA3_1B = Model("Gemma 3 1B", 262_144, 1152)


@dataclass(frozen=True, slots=True)
class Work:
    """What any implementation has to move and compute at least; `bound` says which of the two is the limit."""

    bytes: int
    flops: int
    bound: Literal["bytes", "flops"]


@dataclass(frozen=True, slots=True)
class Case:
    """A family of providers at one shape. Supports have K = head + samples entries; `masked` is a share of the rows."""

    family: FamilyName
    model: Model
    rows: int
    size: Size
    dtype: torch.dtype = torch.float32
    head: int = 16
    samples: int = 48
    masked: float = 0.0
    headline: bool = False  # has a row in the README's table

    @property
    def k(self) -> int:
        return self.head + self.samples

    @property
    def valid_rows(self) -> int:
        return self.rows - round(self.masked * self.rows)

    @property
    def name(self) -> str:
        """Unique: results are kept by it."""
        masked = f", {100 * self.masked:.0f} % masked" if self.masked else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family}, {self.model.name}, N={self.rows}, K={self.k}, {dtype}{masked}"

    @property
    def shape(self) -> str:
        """The sizes that the family's inputs have."""
        if self.family == "kl":
            return f"N={self.rows} K={self.k}"
        width = "" if self.family in ("topk", "support", "gather") else f" H={self.model.width}"
        return f"N={self.rows} V={self.model.vocab}{width} K={self.k}"

    @property
    def work(self) -> Work:
        valid, vocab, width = self.valid_rows, self.model.vocab, self.model.width
        element = self.dtype.itemsize
        logits = self.rows * vocab * element
        head = vocab * width * element
        hidden = valid * width * element
        match self.family:
            case "topk" | "support":  # every logit is read once
                return Work(logits, 0, "bytes")
            case "gather":  # read for the LSE, read again and written for the gradient
                return Work(3 * logits, 0, "bytes")
            case "kl":  # log p, log q, log w and ids in, c out
                return Work(self.rows * self.k * (4 * LOGPROB_BYTES + ID_BYTES), 0, "bytes")
            case "exact_head":  # logits, dH and dW: three products of 2NVH; W and h in, dW and dh out
                return Work(2 * (head + hidden), 6 * valid * vocab * width, "flops")
            case "sampled_head":  # K dot products a row each way, but dW is dense: every element of it is written
                return Work(head + 2 * hidden, 6 * valid * self.k * width, "bytes")
            case "exact_head_zero_sum":  # the softmax's part of the gradient is 0: logits only, but dW is dense
                return Work(2 * (head + hidden), 2 * valid * vocab * width, "flops")
            case "exact_head_frozen":  # logits and dH
                return Work(head + 2 * hidden, 4 * valid * vocab * width, "flops")
            case "linear_topk" | "linear_gather":
                return Work(head + hidden, 2 * valid * vocab * width, "flops")


BF16, FP16 = torch.bfloat16, torch.float16

TOPK = Case("topk", QWEN3_06B, 128, "ci", headline=True)
TOPK_BF16 = Case("topk", QWEN3_06B, 128, "ci", BF16)
SUPPORT = Case("support", QWEN3_06B, 128, "ci", headline=True)
GATHER = Case("gather", QWEN3_06B, 128, "ci", headline=True)
KL = Case("kl", QWEN3_06B, 8192, "ci", headline=True)
EXACT_HEAD = Case("exact_head", QWEN3_06B, 512, "ci", headline=True)
SAMPLED_HEAD = Case("sampled_head", QWEN3_06B, 512, "ci", headline=True)

CASES: tuple[Case, ...] = (
    Case("topk", EMBEDDED, 64, "ci"),
    TOPK,
    TOPK_BF16,
    Case("topk", QWEN3_06B, 128, "full", FP16),
    Case("topk", LLAMA3_8B, 128, "full"),
    Case("topk", GEMMA3_1B, 64, "full"),
    Case("support", EMBEDDED, 64, "ci"),
    SUPPORT,
    Case("support", QWEN3_06B, 128, "full", BF16),
    Case("support", LLAMA3_8B, 128, "full"),
    Case("support", GEMMA3_1B, 64, "full"),
    Case("gather", EMBEDDED, 1024, "ci"),
    GATHER,
    Case("gather", QWEN3_06B, 128, "full", BF16),
    Case("kl", QWEN3_06B, 64, "ci"),
    KL,
    Case("exact_head", EMBEDDED, 1024, "ci"),
    EXACT_HEAD,
    Case("exact_head", QWEN3_06B, 128, "full", masked=0.5),
    Case("exact_head", QWEN3_17B, 64, "full"),
    Case("sampled_head", EMBEDDED, 1024, "ci"),
    SAMPLED_HEAD,
    Case("sampled_head", QWEN3_8B, 64, "full"),
    Case("sampled_head", GEMMA3_1B, 128, "full"),
    Case("linear_topk", EMBEDDED, 64, "ci"),
    Case("linear_topk", QWEN3_06B, 256, "full", headline=True),
    Case("linear_topk", QWEN3_4B, 64, "full"),
    Case("topk", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("topk", QWEN3_8B, 64, "gpu", BF16),
    Case("support", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("gather", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("kl", QWEN3_8B, 8192, "gpu", headline=True),
    Case("exact_head", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("exact_head", QWEN3_8B, 8192, "gpu", BF16, masked=0.5, headline=True),
    Case("exact_head_zero_sum", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("exact_head_frozen", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("sampled_head", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("linear_topk", QWEN3_8B, 8192, "gpu", BF16, headline=True),
    Case("linear_gather", QWEN3_8B, 8192, "gpu", BF16, headline=True),
)


def cases_of(size: Size) -> tuple[Case, ...]:
    """The cases of a size class; "full" has those of "ci" too."""
    sizes = ("ci", "full") if size == "full" else (size,)
    return tuple(case for case in CASES if case.size in sizes)
