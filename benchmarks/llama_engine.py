"""The yardstick: a token Gram for the Llama architecture alone, written by hand.

The algorithm of lddyn's paired Gram without its generality: one forward pass a sequence, a
hand-written VJP of each block, one cotangent at a time on its own causal prefix, rank-one rows
above the top block's attention, push-then-pair of every weight. What a generic engine takes beyond
this is the price of being generic.

Gate and up, and query, key and value, are one product each; rotary pairs are adjacent, so that a
rotation is one complex product; cotangents go one by one, so that their intermediates stay in
cache; products with weights may go to oneDNN, which uses AVX-512 on AMD processors, where torch's
MKL does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

GROUP = 32  # observed cotangents whose pushed factors are held at once
TILE = 16  # tokens of one pairing product
ROWS = 128  # rows of an attention tile

Product = Callable[[Tensor], Tensor]


def product_with(weight: Tensor, onednn: bool) -> Product:
    """x -> x @ weight, by torch's BLAS into a buffer of its own, or by oneDNN."""
    if onednn:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight.T.contiguous(), ROWS)
        return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")
    buffer = weight.new_empty(0)

    def product(x: Tensor) -> Tensor:
        nonlocal buffer
        if len(buffer) < len(x):
            buffer = weight.new_empty(len(x), weight.shape[1])
        return torch.mm(x, weight, out=buffer[: len(x)])

    return product


@dataclass
class Block:
    """Weights of one block, and the products that pull cotangents back through them."""

    norm1: Tensor
    norm2: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    onednn: bool
    pull_qkv: Product = field(init=False)
    pull_o: Product = field(init=False)
    pull_gate_up: Product = field(init=False)
    pull_down: Product = field(init=False)

    def __post_init__(self) -> None:
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(self, f"pull_{name}", product_with(getattr(self, name), self.onednn))


class Engine:
    """The weights of a Llama, laid out for this algorithm."""

    def __init__(self, model: nn.Module, onednn: bool = False):
        config = model.config
        assert config.num_key_value_heads == config.num_attention_heads, "one key head a head"
        self.heads = config.num_attention_heads
        self.epsilon = config.rms_norm_eps
        self.model = model
        self.final_norm = model.model.norm.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.blocks = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.blocks.append(
                Block(
                    norm1=layer.input_layernorm.weight.detach(),
                    norm2=layer.post_attention_layernorm.weight.detach(),
                    qkv=torch.cat(
                        [
                            self._adjacent(attention.q_proj.weight.detach()),
                            self._adjacent(attention.k_proj.weight.detach()),
                            attention.v_proj.weight.detach(),
                        ]
                    ),
                    o=attention.o_proj.weight.detach(),
                    gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
                    down=mlp.down_proj.weight.detach(),
                    onednn=onednn,
                )
            )

    def _adjacent(self, weight: Tensor) -> Tensor:
        """Rows of a query or key weight with the two of a rotated pair next to each other."""
        return weight.view(self.heads, 2, -1, weight.shape[1]).transpose(1, 2).flatten(0, 2)

    @torch.no_grad()
    def gram(self, observed: tuple, updated: tuple) -> Tensor:
        """⟨∇ log π(y_m | χo), ∇ log π(y_l | χu)⟩ over all parameters, (M, L).

        Args:
            observed: (ids, positions of the predicting tokens in ascending order, targets).
            updated: The same; the very same object is pulled back once.
        """
        u = Sequence(self, *updated)
        o = u if observed is updated else Sequence(self, *observed)
        total = (o.hidden @ u.hidden.T) * (o.rows @ u.rows.T)
        top = len(self.blocks) - 1
        for side in {id(s): s for s in (u, o)}.values():
            side.top_mlp()
        total += o.final_gain @ u.final_gain.T
        for name in ("down", "gate_up", "o", "q"):
            (a_o, d_o), (a_u, d_u) = o.top[name], u.top[name]
            total += (a_o @ a_u.T) * (d_o @ d_u.T)
        total += o.gain2 @ u.gain2.T
        self._pair(total, o, u, top, "attention")
        total += o.gain1 @ u.gain1.T
        for layer in reversed(range(top)):
            _pair_states(total, o, u, o.kept[layer].act, u.kept[layer].act)
            self._pair(total, o, u, layer, "mlp")
            total += o.gain2 @ u.gain2.T
            _pair_states(total, o, u, o.kept[layer].mixed, u.kept[layer].mixed)
            self._pair(total, o, u, layer, "attention")
            total += o.gain1 @ u.gain1.T
        return total.add_(_pair_embeddings(o, u))

    def _pair(self, total: Tensor, o: Sequence, u: Sequence, layer: int, part: str) -> None:
        """Pulls both sides through half a block, and pairs its widest factors on the way."""
        name = "normed2" if part == "mlp" else "normed1"
        similarity = getattr(u.kept[layer], name) @ getattr(o.kept[layer], name).T
        width = u.width(layer, part)
        factors = total.new_zeros(len(u), u.length, width)
        for i in range(len(u)):
            u.pull(i, layer, part, factors[i, : u.reach[i]])
        pushed = total.new_empty(min(GROUP, len(o)), u.length, width)
        scratch = total.new_empty(o.length, width)
        for start in range(0, len(o), GROUP):
            stop = min(start + GROUP, len(o))
            for i in range(start, stop):
                reach = o.reach[i]
                if o is u:
                    deltas = factors[i, :reach]
                else:
                    deltas = scratch[:reach]
                    o.pull(i, layer, part, deltas)
                torch.mm(similarity[:, :reach], deltas, out=pushed[i - start])
            _contract(total[start:stop], pushed[: stop - start], factors, u.reach)


@dataclass
class Kept:
    """What one block's VJP needs of its forward pass; (T, ·) unless said otherwise."""

    normed1: Tensor  # with its gain: the input of q, k, v
    unit1: Tensor  # without
    rate1: Tensor  # gain / rms, the diagonal of the norm's Jacobian
    pull1: Tensor  # unit / rms / d, its rank-one part
    query: Tensor  # (H, T, e), rotated, scaled
    key: Tensor  # (H, T, e), rotated, scaled
    value: Tensor  # (H, e, T)
    probabilities: Tensor  # (H, T, T)
    mixed: Tensor  # the input of o
    normed2: Tensor
    unit2: Tensor
    rate2: Tensor
    pull2: Tensor
    act: Tensor  # the input of down
    gate_slope: Tensor  # d act / d gate
    up_slope: Tensor  # d act / d up


class Sequence:
    """One sequence: its stored forward pass, and cotangents on their way down."""

    def __init__(self, engine: Engine, ids: Tensor, positions: Tensor, targets: Tensor):
        self.engine, self.ids, self.positions = engine, ids, positions
        self.reach = (positions + 1).tolist()
        self.length = self.reach[-1]
        self.kept: list[Kept] = []
        self.top: dict[str, tuple[Tensor, Tensor]] = {}
        model, heads, length = engine.model.model, engine.heads, self.length
        x = model.embed_tokens.weight.detach()[ids[:length]]
        cos, sin = model.rotary_emb(x[None], torch.arange(length)[None])
        half = cos.shape[-1] // 2
        self.turn = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        self.turn = self.turn[:, None]  # (T, 1, e/2)
        self.unturn = self.turn.conj().resolve_conj()
        hidden = x.shape[1]
        scale = (hidden // heads) ** -0.25  # on query and key alike
        mask = torch.full((length, length), -torch.inf).triu_(1)
        for block in engine.blocks:
            normed1, unit1, rate1, pull1 = self._norm(x, block.norm1)
            qkv = (normed1 @ block.qkv.T).view(length, 3, heads, -1)
            turned = torch.view_as_complex(qkv[:, :2].unflatten(-1, (-1, 2))) * self.turn[:, None]
            q, k = (torch.view_as_real(turned).flatten(-2) * scale).permute(1, 2, 0, 3).contiguous()
            v = qkv[:, 2].permute(1, 2, 0).contiguous()  # (H, e, T)
            p = torch.softmax(q @ k.mT + mask, -1)
            mixed = (p @ v.mT).transpose(0, 1).reshape(length, hidden)
            x = x + mixed @ block.o.T
            normed2, unit2, rate2, pull2 = self._norm(x, block.norm2)
            gate, up = (normed2 @ block.gate_up.T).chunk(2, 1)
            s = torch.sigmoid(gate)
            silu = gate * s
            act = silu * up
            x = x + act @ block.down.T
            slope = up * (s + silu * (1 - s))
            # Scores take query · key · scale²: a gradient passes the scale on with each factor.
            self.kept.append(
                Kept(
                    normed1,
                    unit1,
                    rate1,
                    pull1,
                    q * scale,
                    k * scale,
                    v,
                    p,
                    mixed,
                    normed2,
                    unit2,
                    rate2,
                    pull2,
                    act,
                    slope,
                    silu,
                )
            )
        normed, unit, rate, pull = (t[positions] for t in self._norm(x, engine.final_norm))
        self.hidden = normed
        logits = normed @ engine.head.T
        self.rows = torch.softmax(logits, 1).neg_()
        at = torch.arange(len(positions))
        self.rows[at, targets] = 0
        self.rows[at, targets] = -self.rows.sum(1)  # 1 − π_y as the sum of the others
        g = self.rows @ engine.head
        self.final_gain = g * unit
        self.state = g * rate - pull * (self.final_gain @ engine.final_norm)[:, None]
        self.gain1 = torch.empty_like(self.state)
        self.gain2 = torch.empty_like(self.state)
        count, shape = max(self.length, len(positions)), (heads, length, length)
        self.buffer = x.new_empty(count, hidden)
        self.products = x.new_empty(heads * min(ROWS, length) * length)
        self.shape = shape
        self.dense = x.new_empty(0)

    def __len__(self) -> int:
        return len(self.reach)

    def _norm(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rms = (x * x).mean(1, keepdim=True).add_(self.engine.epsilon).rsqrt_()
        unit = x * rms
        return unit * gain, unit, gain * rms, unit * (rms / x.shape[1])

    def width(self, layer: int, part: str) -> int:
        """Columns of the factor of half a block: gate and up, or q, k and v (k and v on top)."""
        block = self.engine.blocks[layer]
        if part == "mlp":
            return block.gate_up.shape[0]
        return block.qkv.shape[0] - (self.hidden.shape[1] if layer == len(self.kept) - 1 else 0)

    def top_mlp(self) -> None:
        """Above the last attention a cotangent lives on its own row: all of them at once."""
        kept, block, at = self.kept[-1], self.engine.blocks[-1], self.positions
        x = self.state
        self.top["down"] = (kept.act[at], x.clone())
        pulled = block.pull_down(x)
        deltas = torch.cat([pulled * kept.gate_slope[at], pulled * kept.up_slope[at]], 1)
        self.top["gate_up"] = (kept.normed2[at], deltas)
        pulled = block.pull_gate_up(deltas)
        self.gain2 = pulled * kept.unit2[at]
        x += pulled * kept.rate2[at] - kept.pull2[at] * (self.gain2 @ block.norm2)[:, None]
        self.top["o"] = (kept.mixed[at], x)
        heads = self.engine.heads
        grads = block.pull_o(x).view(len(x), heads, -1).transpose(0, 1)  # (H, M, e)
        p = kept.probabilities[:, at]  # (H, M, T)
        moved = grads @ kept.value
        moved = p * (moved - (p * moved).sum(-1, keepdim=True))
        query = torch.view_as_complex((moved @ kept.key).transpose(0, 1).unflatten(-1, (-1, 2)))
        query = torch.view_as_real(query * self.unturn[at]).reshape(len(x), -1)
        self.top["q"] = (kept.normed1[at], query)
        self._top_attention = (grads.clone(), p, moved, query @ block.qkv[: query.shape[1]])
        self._pull_kv = product_with(block.qkv[query.shape[1] :], block.onednn)
        self.dense = x.new_zeros(len(x), self.length, x.shape[1])

    def pull(self, i: int, layer: int, part: str, out: Tensor) -> None:
        """Takes cotangent i through half a block; its factor goes to `out` (reach, width)."""
        block, kept = self.engine.blocks[layer], self.kept[layer]
        reach = self.reach[i]
        state = self.dense[i, :reach]
        if part == "mlp":
            pulled = block.pull_down(state)
            width = pulled.shape[1]
            torch.mul(pulled, kept.gate_slope[:reach], out=out[:, :width])
            torch.mul(pulled, kept.up_slope[:reach], out=out[:, width:])
            self._norm_pull(
                state,
                block.pull_gate_up(out),
                block.norm2,
                kept.unit2,
                kept.rate2,
                kept.pull2,
                self.gain2[i],
            )
            return
        if layer == len(self.kept) - 1:
            pulled = self._pull_top_attention(i, out)
            state[-1] = self.state[i]
        else:
            self._attention_pull(block.pull_o(state), kept, out)
            pulled = block.pull_qkv(out)
        self._norm_pull(
            state, pulled, block.norm1, kept.unit1, kept.rate1, kept.pull1, self.gain1[i]
        )

    def _norm_pull(
        self,
        state: Tensor,
        pulled: Tensor,
        gain: Tensor,
        unit: Tensor,
        rate: Tensor,
        pull: Tensor,
        gain_gradient: Tensor,
    ) -> None:
        """Adds a norm's VJP to the state, and writes its gain's gradient."""
        reach = len(state)
        weighted = torch.mul(pulled, unit[:reach], out=self.buffer[:reach])
        torch.sum(weighted, 0, out=gain_gradient)
        state.addcmul_(pulled, rate[:reach])
        state.addcmul_(pull[:reach], torch.mv(weighted, gain)[:, None], value=-1)

    def _attention_pull(self, grads: Tensor, kept: Kept, out: Tensor) -> None:
        """Cotangents of attention's output (t, d) -> of q, k, v before rotation, (t, 3 d)."""
        reach, heads = len(grads), self.engine.heads
        # rowsum(P ∘ (dO Vᵀ)) = ⟨dO, P V⟩: no pass over the T x T products.
        inner = torch.mul(grads, kept.mixed[:reach], out=self.buffer[:reach])
        inner = inner.view(reach, heads, -1).sum(-1).T.unsqueeze(-1)
        grads = grads.view(reach, heads, -1).transpose(0, 1)
        query = grads.new_empty(heads, reach, grads.shape[-1])
        key = torch.zeros_like(query)
        value = torch.zeros_like(query)
        for start in range(0, reach, ROWS):
            stop = min(start + ROWS, reach)
            p = kept.probabilities[:, start:stop, :stop]
            moved = self.products[: heads * (stop - start) * stop].view(p.shape)
            part = grads[:, start:stop]
            torch.bmm(part, kept.value[:, :, :stop], out=moved)
            moved.sub_(inner[:, start:stop]).mul_(p)
            if reach <= ROWS:
                torch.bmm(moved, kept.key[:, :stop], out=query)
                torch.bmm(moved.mT, kept.query[:, :stop], out=key)
                torch.bmm(p.mT, part, out=value)
            else:
                query[:, start:stop] = moved @ kept.key[:, :stop]
                key[:, :stop] += moved.mT @ kept.query[:, start:stop]
                value[:, :stop] += p.mT @ part
        width = grads.shape[-1]
        split = out.view(reach, 3, heads, width)
        for index, x in enumerate((query, key)):
            pairs = torch.view_as_complex(x.view(heads, reach, -1, 2)).transpose(0, 1)
            target = torch.view_as_complex(split[:, index].unflatten(-1, (-1, 2)))
            torch.mul(pairs, self.unturn[:reach], out=target)
        split[:, 2] = value.transpose(0, 1)

    def _pull_top_attention(self, i: int, out: Tensor) -> Tensor:
        """One row of the top block's attention: k and v on the whole prefix, q on the row alone."""
        grads, p, moved, from_query = self._top_attention
        kept, reach, heads = self.kept[-1], self.reach[i], self.engine.heads
        split = out.view(reach, 2, heads, -1)
        key = moved[:, i, :reach, None] * kept.query[:, reach - 1, None]  # (H, t, e)
        pairs = torch.view_as_complex(key.view(heads, reach, -1, 2)).transpose(0, 1)
        target = torch.view_as_complex(split[:, 0].unflatten(-1, (-1, 2)))
        torch.mul(pairs, self.unturn[:reach], out=target)
        split[:, 1] = (p[:, i, :reach, None] * grads[:, i, None]).transpose(0, 1)
        pulled = self._pull_kv(out)
        pulled[-1] += from_query[i]
        return pulled


def _contract(total: Tensor, pushed: Tensor, factors: Tensor, reach: list[int]) -> None:
    """total += ⟨pushed (m, t, j), factors (l, t, j)⟩, a tile of tokens at a time."""
    first = 0
    for start in range(0, pushed.shape[1], TILE):
        stop = min(start + TILE, pushed.shape[1])
        while reach[first] <= start:
            first += 1
        left, right = pushed[:, start:stop].flatten(1), factors[first:, start:stop].flatten(1)
        total[:, first:].addmm_(left, right.T)


def _pair_states(total: Tensor, o: Sequence, u: Sequence, a_o: Tensor, a_u: Tensor) -> None:
    """The Gram of a weight whose output is the residual stream: its cotangents are the states."""
    similarity = a_u @ a_o.T
    pushed = total.new_empty(min(GROUP, len(o)), u.length, o.dense.shape[2])
    for start in range(0, len(o), GROUP):
        stop = min(start + GROUP, len(o))
        for i in range(start, stop):
            reach = o.reach[i]
            torch.mm(similarity[:, :reach], o.dense[i, :reach], out=pushed[i - start])
        _contract(total[start:stop], pushed[: stop - start], u.dense, u.reach)


def _pair_embeddings(o: Sequence, u: Sequence) -> Tensor:
    """Σ over tokens in both sequences of ⟨Σ_s δ_m[s], Σ_t δ_l[t]⟩."""
    ids_o, ids_u = o.ids[: o.length], u.ids[: u.length]
    shared = torch.tensor(sorted(set(ids_o.tolist()) & set(ids_u.tolist())), dtype=torch.long)
    sums = []
    for side, ids in ((o, ids_o), (u, ids_u)):
        chosen = (shared[:, None] == ids).to(side.dense.dtype)
        sums.append((chosen @ side.dense).flatten(1))
    return sums[0] @ sums[1].T
