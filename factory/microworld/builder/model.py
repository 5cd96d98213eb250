"""The builder's own Llama: the plain architecture in a few lines, so that tree masks and the helps
of training fit in.

`export` writes it as an ordinary Hugging Face checkpoint; the auxiliary heads and supervised
attention stay here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefab.factory.microworld.builder.batch import HELPFUL, OVERALL, Batch


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model. `hidden` is split over `heads`; `supervised` is the layer whose
    attention is taught.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    inner: int
    supervised: int
    context: int = 2048
    theta: float = 10_000.0


class Block(nn.Module):
    """One decoder layer; `forward` also returns its attention probabilities where asked."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = s.heads
        self.before, self.between = nn.RMSNorm(s.hidden, eps=1e-6), nn.RMSNorm(s.hidden, eps=1e-6)
        self.qkv, self.out = (
            nn.Linear(s.hidden, 3 * s.hidden, bias=False),
            nn.Linear(s.hidden, s.hidden, bias=False),
        )
        self.gate_up, self.down = (
            nn.Linear(s.hidden, 2 * s.inner, bias=False),
            nn.Linear(s.inner, s.hidden, bias=False),
        )

    def forward(
        self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], bias_B1TT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer's output (B T D) and its attention (B H T T). `turn` is (cos, sin) of the
        positions' angles.
        """
        B, T, D = x_BTD.shape
        qkv = (
            self.qkv(self.before(x_BTD))
            .view(B, T, 3, self.heads, D // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = rotate(qkv[0], turn), rotate(qkv[1], turn), qkv[2]
        scores = torch.matmul(q, k.transpose(2, 3) * (D // self.heads) ** -0.5)
        probs_BHTT = torch.softmax(scores.add_(bias_B1TT), -1)
        x_BTD = x_BTD + self.out(torch.matmul(probs_BHTT, v).transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.between(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up), probs_BHTT


def rotate(x_BHTD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout of Llama checkpoints. Source: RoFormer,
    eq. 34.
    """
    cos, sin = turn
    a, b = x_BHTD.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """Embedding, blocks, norm, tied output; plus two heads that only training uses."""

    def __init__(self, s: Shape, faults: int, asked: int) -> None:
        super().__init__()
        self.shape = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-6)
        self.fault_head, self.asked_head = nn.Linear(s.hidden, faults), nn.Linear(s.hidden, asked)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(
                    p,
                    std=0.02 * ((2 * s.layers) ** -0.5 if deep else 1.0) * (256 / s.hidden) ** 0.5,
                )

    def forward(
        self, ids_BT: Tensor, position_BT: Tensor, bias_B1TT: Tensor
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """(final states B T D, states before the supervised layer B T D, attention by layers below
        it, each B H T T).
        """
        half = self.shape.hidden // self.shape.heads // 2
        angle = position_BT[:, None, :, None] * self.shape.theta ** (-torch.arange(half) / half)
        turn = (angle.cos(), angle.sin())
        x = self.embed(ids_BT)
        middle, attention = x, {}
        for i, block in enumerate(self.blocks):
            middle = x if i == self.shape.supervised else middle
            x, probs = block(x, turn, bias_B1TT)
            attention[self.shape.supervised - i] = probs
        return self.norm(x), middle, attention


def tree_bias(tree_BT: Tensor, branch_BT: Tensor) -> Tensor:
    """0 where a token may look (earlier, same tree, the trunk or its own branch), else a large
    negative. Shape: B 1 T T.
    """
    T = tree_BT.shape[1]
    same = tree_BT[:, :, None] == tree_BT[:, None, :]
    own = (branch_BT[:, :, None] == branch_BT[:, None, :]) | (branch_BT[:, None, :] == 0)
    see = same & own & torch.ones(T, T, dtype=torch.bool).tril()
    see |= torch.eye(T, dtype=torch.bool)  # padding looks at itself, so that no row is empty
    return torch.zeros(see.shape).masked_fill_(~see, -1e4)[:, None]


def losses(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """The losses of one batch: text (what is kept), and the helps: faults, asked, look, match,
    count.
    """
    t = {
        k: torch.from_numpy(getattr(batch, k))
        for k in (
            "ids_BT",
            "position_BT",
            "tree_BT",
            "branch_BT",
            "target_BT",
            "weight_BT",
            "asked_BT",
            "look_N4",
            "look_NT",
            "count_N4",
        )
    }
    x, middle, attention = model(
        t["ids_BT"], t["position_BT"], tree_bias(t["tree_BT"], t["branch_BT"])
    )
    at = t["target_BT"] >= 0
    logits = F.linear(x[at], model.embed.weight)
    target, weight = t["target_BT"][at], t["weight_BT"][at]
    each = F.cross_entropy(logits, target, reduction="none")
    middle = F.rms_norm(
        middle, middle.shape[-1:]
    )  # the heads learn nothing from the small raw residual stream
    rows, cols, values = (torch.from_numpy(a) for a in batch.faults)
    asked = t["asked_BT"] >= 0
    known = ~values.isnan()
    wrong = (
        F.binary_cross_entropy_with_logits(
            model.fault_head(middle[rows, cols]), values.nan_to_num(), reduction="none"
        )
        * known
    )
    met = {}
    for below in (0, 2):
        here = t["look_N4"][:, 1] == below
        row, _, head, column = t["look_N4"][here].T
        met[below] = (
            ((attention[below][row, head, column] * t["look_NT"][here]).sum(-1) + 1e-5)
            .log()
            .neg()
            .mean()
        )
    row, column, seen, n = t["count_N4"].T
    evenly = (n * attention[0][row, 0, column, seen] + 1e-5).log().neg()
    with torch.no_grad():
        label = weight >= 5
        hit = logits.argmax(-1) == target
        helpful = label & (t["asked_BT"][at] == HELPFUL)
    return {
        "text": (each * weight).sum() / weight.sum(),
        "faults": (
            wrong.sum(0) / known.sum(0).clamp(min=1)
        ).mean(),  # each principle alike, however seldom it is marked
        "asked": F.cross_entropy(model.asked_head(middle[asked]), t["asked_BT"][asked]),
        "look": met[0],
        "match": met[2],
        "count": evenly.mean() if len(evenly) else x.new_zeros(()),
        "label_right": hit[label].float().mean(),
        "overall_right": hit[label & (t["asked_BT"][at] == OVERALL)].float().mean(),
        "helpful_right": hit[helpful].float().mean(),
        "label_loss": each[label].mean(),
        "words_right": hit[~label].float().mean(),
        "words_loss": each[~label].mean(),
    }


def export(model: Llama, folder: Path, tokens: dict[str, int], extra: dict[str, str]) -> None:
    """Write the model as a bf16 safetensors Llama checkpoint with its configuration."""
    from safetensors.torch import save_file

    s, state, out = model.shape, model.state_dict(), {}
    out["model.embed_tokens.weight"], out["model.norm.weight"] = (
        state["embed.weight"],
        state["norm.weight"],
    )
    for i in range(s.layers):
        own, to = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = state[own + "qkv.weight"].chunk(3)
        gate, up = state[own + "gate_up.weight"].chunk(2)
        out |= {
            to + f"self_attn.{n}_proj.weight": w
            for n, w in zip("qkvo", (q, k, v, state[own + "out.weight"]), strict=True)
        }
        out |= {
            to + "mlp.gate_proj.weight": gate,
            to + "mlp.up_proj.weight": up,
            to + "mlp.down_proj.weight": state[own + "down.weight"],
        }
        out |= {
            to + "input_layernorm.weight": state[own + "before.weight"],
            to + "post_attention_layernorm.weight": state[own + "between.weight"],
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in out.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.inner,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "head_dim": s.hidden // s.heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": s.context,
        "rope_theta": s.theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "use_cache": True,
        **tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ends = dict(tokens.items())
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")
    (folder / "world.json").write_text(json.dumps({**extra, "shape": asdict(s)}, indent=1) + "\n")
