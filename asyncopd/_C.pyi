"""The compiled module: csrc/bindings.cpp. Addresses and streams are integers; a status comes back."""

openmp: bool
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
