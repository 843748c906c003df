"""Attentions whose keys and values are repeated for the heads that share them, and those where a pass must not read the source."""

from __future__ import annotations

import torch
import torch.nn.functional as F

B, HEADS, GROUPS, S, D = 2, 6, 2, 40, 16


def repeated(x: torch.Tensor) -> torch.Tensor:
    """As transformers' repeat_kv."""
    b, groups, s, d = x.shape
    x = x[:, :, None, :, :].expand(b, groups, HEADS // GROUPS, s, d)
    return x.reshape(b, groups * (HEADS // GROUPS), s, d)


def attention(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), repeated(value), attn_mask=mask) * 2


def written_between(query, key, value, mask):
    old = repeated(key), repeated(value)
    key.mul_(2)
    return F.scaled_dot_product_attention(query, *old, attn_mask=mask)


def copy_written(query, key, value, mask):
    key, value = repeated(key), repeated(value).contiguous()
    written = key[:, :, 0].zero_(), value.mul_(2)  # and used: else it would be dead code here
    result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return result + 0 * (written[0].sum() + written[1].sum())


def written_between_copies(query, key, value, mask):
    copies = [x[:, :, None].expand(B, GROUPS, 3, S, D).clone() for x in (key, value)]
    key.mul_(2)
    copies = [x.reshape(B, HEADS, S, D) for x in copies]
    return F.scaled_dot_product_attention(query, *copies, attn_mask=mask)


def repeated_over_the_batch(query, key, value, mask):
    key, value = (
        x[:1, :, None].expand(B, GROUPS, 3, S, D).reshape(B, HEADS, S, D) for x in (key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


COPIES_THAT_DIFFER = (
    written_between,
    copy_written,
    written_between_copies,
    repeated_over_the_batch,
)
