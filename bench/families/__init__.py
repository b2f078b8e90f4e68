"""What is compared on a case, one module a family of ops."""

from bench.cases import FamilyName
from bench.families import extraction, gather, head, kl, linear_topk
from bench.families.base import COMPILED, EAGER, LIMIT, OURS, Family, Provider, Unavailable, Wrong, on_backend
from bench.families.peers import PEERS

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        extraction.TOPK,
        extraction.SUPPORT,
        gather.GATHER,
        kl.KL,
        head.EXACT_HEAD,
        head.SAMPLED_HEAD,
        linear_topk.LINEAR_TOPK,
    )
}

# On a GPU asyncopd chooses a backend by itself only once it has been measured: these show what there is to choose from.
GPU_BACKENDS = ("triton", "cuda")


def providers_on(device_type: str, family: FamilyName) -> tuple[Provider, ...]:
    """Everybody who is compared on a kind of device: on a GPU asyncopd's backends and other projects' kernels too."""
    about = FAMILIES[family]
    if device_type != "cuda":
        return about.providers
    ours = [provider for provider in about.providers if provider.name.startswith(OURS)]
    forced = tuple(on_backend(provider, backend) for provider in ours for backend in GPU_BACKENDS)
    return (*about.providers, *forced, *PEERS.get(family, ()))


__all__ = [
    "COMPILED",
    "EAGER",
    "FAMILIES",
    "LIMIT",
    "OURS",
    "Family",
    "Provider",
    "Unavailable",
    "Wrong",
    "on_backend",
    "providers_on",
]
