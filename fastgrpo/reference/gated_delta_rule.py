# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain PyTorch: the definition, one token after another."""

import torch


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (T, H, V) and the last state (H, K, V) of one sequence of T tokens.

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T,    o_t = S_t^T q_t

    q, k (T, H_k, K) serve H / H_k heads each; v (T, H, V); g <= 0 and beta (T, H); state: S_0
    (H, K, V), zeros without. Computed in float32, or in float64 for float64 inputs; out in q's
    dtype. Yang et al., arXiv 2412.06464.
    """
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    share = v.shape[1] // k.shape[1]
    q, k, v, g, beta = (x.to(compute) for x in (q, k, v, g, beta))
    q, k = q.repeat_interleave(share, 1), k.repeat_interleave(share, 1)
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if state is None else state.to(compute)
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t in zip(q, k, v, g, beta, strict=True):
        state = state * g_t.exp()[:, None, None]
        seen = torch.einsum("hkv,hk->hv", state, k_t)
        state = state + torch.einsum("hk,hv->hkv", k_t, beta_t[:, None] * (v_t - seen))
        outputs.append(torch.einsum("hkv,hk->hv", state, q_t))
    return torch.stack(outputs).to(dtype), state
