"""What is compared on a case, one module a family of ops."""

from bench.families import extraction, gather, head, kl, linear_topk
from bench.families.base import COMPILED, EAGER, LIMIT, OURS, Family, Provider, Unavailable, Wrong

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

__all__ = ["COMPILED", "EAGER", "FAMILIES", "LIMIT", "OURS", "Family", "Provider", "Unavailable", "Wrong"]
