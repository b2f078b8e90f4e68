"""The compiled module: csrc/bindings.cpp. Addresses and streams are integers; a status comes back."""

openmp: bool
sanitized: bool
cuda: bool

def cpu_isas() -> list[str]: ...
def cpu_gather_logprobs(
    logits: int,
    dtype: int,
    row_stride: int,
    ids: int,
    id_type: int,
    rows: int,
    vocab: int,
    num_ids: int,
    inv_temperature: float,
    logprobs: int,
    lse: int,
    threads: int,
    isa: int = -1,
) -> int: ...
def cpu_gather_logprobs_backward(
    grad: int,
    logits: int,
    dtype: int,
    row_stride: int,
    lse: int,
    ids: int,
    id_type: int,
    rows: int,
    first: int,
    columns: int,
    vocab: int,
    num_ids: int,
    inv_temperature: float,
    dlogits: int,
    out_stride: int,
    threads: int,
    isa: int = -1,
) -> int: ...
def cpu_gather_tile(
    logits: int,
    row_stride: int,
    ids: int,
    rows: int,
    first: int,
    columns: int,
    num_ids: int,
    inv_temperature: float,
    peaks: int,
    sums: int,
    logprobs: int,
    lse: int,
    threads: int,
    isa: int = -1,
) -> int: ...
def cpu_topk_logprobs(
    logits: int,
    dtype: int,
    row_stride: int,
    rows: int,
    vocab: int,
    k: int,
    inv_temperature: float,
    ids: int,
    logprobs: int,
    lse: int,
    threads: int,
    isa: int = -1,
) -> int: ...
def cpu_sample_support(
    logits: int,
    dtype: int,
    row_stride: int,
    rows: int,
    vocab: int,
    num_samples: int,
    head: int,
    seed: int,
    streams: int,
    sampled_ids: int,
    inv_temperature: float,
    ids: int,
    log_weights: int,
    logprobs: int,
    lse: int,
    threads: int,
    isa: int = -1,
) -> int: ...

# Only where `cuda` is true.
def cuda_gather_logprobs(
    logits: int,
    dtype: int,
    row_stride: int,
    ids: int,
    id_type: int,
    rows: int,
    vocab: int,
    num_ids: int,
    inv_temperature: float,
    logprobs: int,
    lse: int,
    device: int,
    stream: int,
) -> int: ...
