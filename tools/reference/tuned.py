"""The five networks and their objectives in PyTorch, written for speed; see :mod:`reference.steps`.

One projection for queries, keys and values, fused attention, output heads at the hidden genes only,
operations in place where autograd allows, the inputs of all genes without a count worked out once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[nn.Module], torch.Tensor]
EPSILON = 1e-4  # of FAVOR+'s features


# ------------------------------------------------------------------------------------- layers
class Layer(nn.Module):
    """A transformer layer around any attention of [B, H, S, D]; post-norm, or pre-norm as the Performers."""

    def __init__(
        self, d: int, heads: int, d_ff: int, *, d_head: int = 0, pre: bool = False,
        rates: tuple[float, float], activation: str = "relu", qkv_bias: bool = True, eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        inner = heads * (d_head or d // heads)
        self.heads, self.pre, self.rates = heads, pre, rates
        self.activation = F.relu if activation == "relu" else F.gelu
        self.qkv, self.out = nn.Linear(d, 3 * inner, bias=qkv_bias), nn.Linear(inner, d)
        self.up, self.down = nn.Linear(d, d_ff), nn.Linear(d_ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        if pre:
            m = int(inner // heads * math.log(inner // heads))
            self.register_buffer("projection", torch.randn(m, inner // heads))

    def attend(
        self, x: torch.Tensor, attention: Callable[..., torch.Tensor], unprojected: int
    ) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = attention(q, k, v, self.projection) if self.pre else attention(q, k, v)
        heads = heads.transpose(1, 2).flatten(2)
        if not unprojected:
            return self.out(heads)
        return torch.cat([heads[:, :unprojected], self.out(heads[:, unprojected:])], 1)

    def forward(
        self, x: torch.Tensor, attention: Callable[..., torch.Tensor], unprojected: int = 0
    ) -> torch.Tensor:
        rate, inner = self.rates
        drop = lambda y, p: F.dropout(y, p) if p else y  # noqa: E731
        feed = lambda y: self.down(drop(self.activation(self.up(y)), inner))  # noqa: E731
        if self.pre:
            x = x + drop(self.attend(self.norm1(x), attention, 0), rate)
            return x + drop(feed(self.norm2(x)), rate)
        x = self.norm1(x + drop(self.attend(x, attention, unprojected), rate))
        return self.norm2(x + drop(feed(x), rate))


def softmax_attention(
    valid: torch.Tensor, dtype: torch.dtype, unknown: int = 0, flash: bool = False
) -> Callable[..., torch.Tensor]:
    """Fused attention under a mask that is made once a batch. Unknown positions see the
    known and themselves. ``flash``: the kernel of FlashAttention, which knows no mask; all see all."""
    if flash:
        return flash_attention
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, -1e30)[
        :, None, None
    ]
    if not unknown:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    own = torch.full((unknown, unknown), -1e30, dtype=dtype, device=valid.device).fill_diagonal_(0.0)
    known = bias[..., unknown:]
    both = torch.cat([own.expand(len(valid), 1, -1, -1), known.expand(-1, -1, unknown, -1)], -1)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first = F.scaled_dot_product_attention(q[:, :, :unknown], k, v, attn_mask=both)
        q, k, v = (x[:, :, unknown:] for x in (q, k, v))
        return torch.cat([first, F.scaled_dot_product_attention(q, k, v, attn_mask=known)], 2)

    return attention


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def performer_attention(valid: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """FAVOR+ with two passes over the features: epsilon is put into the sums, not added to each feature."""
    mask = None if valid is None else valid[:, None, :, None]

    def features(x: torch.Tensor, projection: torch.Tensor, dims: tuple[int, ...], mask: Any) -> torch.Tensor:
        products = x @ projection.T
        with torch.no_grad():
            top = products.amax(-1, keepdim=True)
            if mask is not None:
                top = top.masked_fill(~mask, -torch.inf)
            if len(dims) > 1:
                top = top.amax(-2, keepdim=True)
        less = (x * x).sum(-1, keepdim=True) / 2 + top
        if mask is not None:
            less = less.masked_fill(~mask, torch.inf)
        return products.sub_(less).exp_()

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.25
        if mask is not None:
            v = v * mask
        k = features(k * scale, projection, (-1, -2), mask)
        n = k.shape[2] if mask is None else mask.sum(2)[..., None]
        context = k.transpose(-1, -2) @ v + EPSILON * v.sum(2, keepdim=True)
        total = k.sum(2)[..., None] + EPSILON * n
        q = features(q * scale, projection, (-1,), None)
        top = q @ context + EPSILON * context.sum(2, keepdim=True)
        return top / (q @ total + EPSILON * total.sum(2, keepdim=True))

    return attention


def stack(n: int, *args: Any, **options: Any) -> nn.ModuleList:
    return nn.ModuleList([Layer(*args, **options) for _ in range(n)])


def mlp(*sizes: int, activation: type[nn.Module] = nn.LeakyReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


# -------------------------------------------------------------------------------------- tuned
class Tuned:
    """For each system ``name(config, n_genes, tokens, device) -> (module, its loss)``."""

    @staticmethod
    def scgpt(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        d = c.d_model
        gene_id, generative = t["gene_id"], c.objective == "generative"
        room = int(gene_id.shape[1] * max(c.mask_fractions) + 1e-4)
        unknown = room if generative else 0
        cls = torch.full_like(gene_id[:, :1], n + 1)
        gene_id = torch.cat([gene_id[:, :unknown], cls, gene_id[:, unknown:]], 1)
        shown = torch.cat([torch.full_like(t["value"][:, :1], c.cls_value), t["value"][:, unknown:]], 1)[
            ..., None
        ]
        own = slice(0, room) if generative else slice(1, room + 1)
        wanted, target = t["hidden"][:, :room], t["target"][:, :room][t["hidden"][:, :room]]
        attention = softmax_attention(gene_id >= 0, t["dtype"], unknown, t["flash"])
        gene_id = torch.where(gene_id < 0, n, gene_id)
        m = nn.ModuleDict(
            {
                "gene": nn.Embedding(n + 3, d),
                "gene_norm": nn.LayerNorm(d),
                "value": mlp(1, d, d, activation=nn.ReLU),
                "value_norm": nn.LayerNorm(d),
                "flag": nn.Embedding(2, d),
                "layers": stack(c.n_layers, d, c.n_heads, c.d_ff, rates=(c.dropout, c.dropout)),
                "decoder": mlp(d, d, d, 1),
                "query": nn.Linear(d, d),
                "weight": nn.Linear(d, d, bias=False),
            }
        ).to(device)

        def mse(value: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(value.float(), target)

        def transform(m: Any, x: torch.Tensor) -> torch.Tensor:
            for layer in m["layers"]:
                x = layer(x, attention, unknown)
            return x

        def loss(m: Any) -> torch.Tensor:
            gene = m["gene_norm"](m["gene"](gene_id))
            x = gene[:, unknown:] + F.dropout(m["value_norm"](m["value"](shown)), c.dropout)
            if unknown:
                x = torch.cat([gene[:, :unknown] + m["flag"].weight[1], x], 1)
            states = transform(m, x)
            cell = states[:, unknown]
            total = mse(m["decoder"](states[:, own][wanted])[:, 0])
            query = torch.sigmoid(m["query"](gene[:, own]))
            total = total + mse((query @ (cell @ m["weight"].weight)[..., None])[..., 0][wanted])
            if generative and c.second_pass_after:
                again = torch.cat([x[:, :unknown], cell.detach()[:, None], x[:, unknown + 1 :]], 1)
                total = total + mse(m["decoder"](transform(m, again)[:, own][wanted])[:, 0])
            return total

        return m, loss

    @staticmethod
    def geneformer(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        d, size = c.d_model, n + (4 if c.specials else 2)
        cell, slot = torch.nonzero(t["hidden"], as_tuple=True)
        place, target = t["position"][cell, slot], t["target"][cell, slot]
        attention = softmax_attention(t["real"], t["dtype"], flash=t["flash"])
        options: dict[str, Any] = {"rates": (c.dropout, 0.0), "eps": 1e-12}
        m = nn.ModuleDict(
            {
                "gene": nn.Embedding.from_pretrained(0.02 * torch.randn(size, d), freeze=False),
                "rank": nn.Embedding.from_pretrained(0.02 * torch.randn(c.max_length, d), freeze=False),
                "norm": nn.LayerNorm(d, 1e-12),
                "layers": stack(c.n_layers, d, c.n_heads, c.d_ff, **options),
                "transform": nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.LayerNorm(d, 1e-12)),
            }
        ).to(device)
        m.register_parameter("bias", nn.Parameter(torch.zeros(size, device=device)))

        def loss(m: Any) -> torch.Tensor:
            x = F.dropout(
                m["norm"](m["gene"](t["token"]) + m["rank"].weight[: t["token"].shape[1]]), c.dropout
            )
            for layer in m["layers"]:
                x = layer(x, attention)
            return F.cross_entropy(F.linear(m["transform"](x[cell, place]), m["gene"].weight, m.bias), target)

        return m, loss

    @staticmethod
    def scbert(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        d = c.d_model
        rates = (c.dropout, c.dropout)
        m = nn.ModuleDict(
            {
                "token": nn.Embedding(7, d),
                "gene": nn.Embedding(n + 1, d).requires_grad_(False),
                "layers": stack(
                    c.n_layers, d, c.n_heads, c.d_ff,
                    d_head=c.d_head, pre=True, rates=rates, activation="gelu", qkv_bias=False,
                ),
                "bins": nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 7)),
            }
        ).to(device)  # fmt: skip
        cell, slot = torch.nonzero(t["hidden"], as_tuple=True)
        place, target = t["gene_id"][cell, slot], t["target"][cell, slot]
        attention = performer_attention(None)

        def loss(m: Any) -> torch.Tensor:
            x = m["token"](t["shown"]) + m["gene"].weight
            for layer in m["layers"]:
                x = layer(x, attention)
            return F.cross_entropy(m["bins"](x[cell, place]), target)

        return m, loss

    @staticmethod
    def celllm(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        d = c.d_model
        rates = (c.dropout, c.dropout)
        m = nn.ModuleDict(
            {
                "token": nn.Embedding(8, d),
                "gene": nn.Embedding(n + 2, d).requires_grad_(False),
                "layers": stack(
                    c.n_layers, d, c.n_heads, c.d_ff,
                    d_head=c.d_head, pre=True, rates=rates, activation="gelu", qkv_bias=False,
                ),
                "norm": nn.LayerNorm(d),
                "bins": nn.Linear(d, 8),
            }
        ).to(device)  # fmt: skip
        token, place = celllm_inputs(n, t, 2)
        hidden = t["hidden"].repeat_interleave(2, 0)
        cell, slot = torch.nonzero(hidden, as_tuple=True)
        target = t["target"].repeat_interleave(2, 0)[cell, slot]
        attention = performer_attention(place <= n)

        def loss(m: Any) -> torch.Tensor:
            x = m["token"](token) + m["gene"](place)
            for layer in m["layers"]:
                x = layer(x, attention)
            masked = F.cross_entropy(m["bins"](m["norm"](x[cell, slot + 1])), target)
            return masked + contrast(m["norm"](x[:, 0]), c.temperature)

        return m, loss

    @staticmethod
    def scfoundation(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        d, width = c.d_model, c.decoder_d_model
        rates = (c.dropout, c.dropout)
        m = nn.ModuleDict(
            {
                "up": nn.Linear(1, c.n_bins),
                "mix": nn.Linear(c.n_bins, c.n_bins),
                "table": nn.Embedding(c.n_bins, d),
                "special": nn.Embedding(2, d),
                "gene": nn.Embedding(n + 3, d),
                "layers": stack(c.n_layers, d, c.n_heads, c.d_ff, rates=rates),
                "norm": nn.LayerNorm(d),
                "to_decoder": nn.Linear(d, width),
                "decoder": stack(
                    c.decoder_n_layers, width, c.decoder_n_heads, c.decoder_d_ff,
                    d_head=c.decoder_d_head, pre=True, rates=(0.0, 0.0), activation="gelu",
                ),
                "value": nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 1)),
            }
        ).to(device)  # fmt: skip
        gene_id = torch.cat(
            [t["gene_id"], torch.tensor([n, n + 1], device=device).expand(len(t["gene_id"]), 2)], 1
        )
        number = torch.cat([t["value"], t["depth"]], 1)
        valid, direct = gene_id >= 0, t["direct_id"] >= 0
        places = torch.cat([gene_id, t["direct_id"]], 1)
        cell, slot = torch.nonzero(places >= 0, as_tuple=True)
        place = places[cell, slot]
        asked, hidden = torch.nonzero(direct[:, : t["target"].shape[1]], as_tuple=True)
        site, target = t["direct_id"][asked, hidden], t["target"][asked, hidden]
        attention = softmax_attention(valid, t["dtype"], flash=t["flash"])
        linear_attention = performer_attention(None)

        def embed(m: Any, number: torch.Tensor) -> torch.Tensor:
            a = F.leaky_relu(m["up"](number[..., None]), 0.1)
            return torch.softmax(c.bin_alpha * a + m["mix"](a), -1) @ m["table"].weight

        def loss(m: Any) -> torch.Tensor:
            gene = m["gene"].weight
            x = torch.where(valid[..., None], embed(m, number), m["special"].weight[1])
            x = x + m["gene"](torch.where(valid, gene_id, n + 2))
            for layer in m["layers"]:
                x = layer(x, attention)
            shown = torch.where(
                t["direct_hidden"][..., None], m["special"].weight[0], embed(m, t["direct_value"])
            )
            known = torch.cat([m["norm"](x), shown], 1)[cell, slot] + m["gene"](place)
            zero = m["to_decoder"](gene[: n + 2] + embed(m, torch.zeros((), device=device)))
            x = zero.expand(len(places), -1, -1).clone().index_put_((cell, place), m["to_decoder"](known))
            for layer in m["decoder"]:
                x = layer(x, linear_attention)
            return F.mse_loss(m["value"](x[asked, site])[:, 0].float(), target)

        return m, loss


def celllm_inputs(n: int, t: dict[str, torch.Tensor], views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, place) [views B, S + 1]: CLS first, 7 and n + 1 where padded."""
    valid = t["gene_id"] >= 0
    token = F.pad(torch.where(valid, t["shown"], 7), (1, 0), value=6)
    place = F.pad(torch.where(valid, t["gene_id"], n + 1), (1, 0), value=n)
    return token.repeat_interleave(views, 0), place.repeat_interleave(views, 0)


def contrast(cell: torch.Tensor, temperature: float) -> torch.Tensor:
    a, b = F.normalize(cell[::2].float(), dim=-1), F.normalize(cell[1::2].float(), dim=-1)
    return F.cross_entropy(a @ b.T / temperature, torch.arange(len(a), device=cell.device))
