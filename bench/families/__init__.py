"""What is compared on a case, one module a family of ops."""

from bench.cases import FamilyName
from bench.families import extraction, gather, head, kl, linear_scores
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
        head.ZERO_SUM,
        head.FROZEN,
        head.SAMPLED_HEAD,
        linear_scores.LINEAR_TOPK,
        linear_scores.LINEAR_GATHER,
    )
}

# A GPU's backends that are not chosen there by themselves: compared with the one that is.
OTHER_GPU_BACKENDS = ("cuda",)


def providers_on(device_type: str, family: FamilyName, *, peers: bool = True) -> tuple[Provider, ...]:
    """Everybody who is compared on a kind of device; without peers the limit, torch.compile and asyncopd alone.

    On a GPU the peers include asyncopd's other backends and other projects' kernels.
    """
    about = FAMILIES[family]
    ours = [provider for provider in about.providers if provider.name.startswith(OURS)]
    if not peers:
        return tuple(provider for provider in about.providers if provider.name in (LIMIT, COMPILED) or provider in ours)
    if device_type != "cuda":
        return about.providers
    forced = tuple(on_backend(provider, backend) for provider in ours for backend in OTHER_GPU_BACKENDS)
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
