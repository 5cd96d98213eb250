"""AdamW for weights in bf16: the optimiser keeps a copy in fp32, which it updates and copies back.

Without it, an update below 1/256 of a weight is lost in bf16. Its moments are in fp32 too.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def master_adamw() -> Any:
    """The optimiser's class; torch is imported only where it is used."""
    import torch
    from torch.optim.adamw import adamw

    class MasterAdamW(torch.optim.AdamW):
        """AdamW whose state has, beside the moments, `master`: the weight in fp32."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Update the copies in fp32, then the weights."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                states = [self._state_of(p) for p in params]
                masters, firsts, seconds, steps = (
                    [state[name] for state in states]
                    for name in ("master", "exp_avg", "exp_avg_sq", "step")
                )
                beta1, beta2 = group["betas"]
                adamw(
                    masters,
                    [p.grad.float() for p in params],
                    firsts,
                    seconds,
                    [],
                    steps,
                    foreach=None if group["fused"] else True,
                    fused=group["fused"],
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                if params:
                    torch._foreach_copy_(params, masters)
            return loss

        def _state_of(self, param: Any) -> dict[str, Any]:
            state: dict[str, Any] = self.state[param]
            if not state:
                state["step"] = torch.zeros((), device=param.device)
                state["master"] = param.detach().float().clone()
                state["exp_avg"] = torch.zeros_like(state["master"])
                state["exp_avg_sq"] = torch.zeros_like(state["master"])
            return state

        def load_state_dict(self, state_dict: Any) -> None:
            """As every optimiser's, which would give the state the weights' precision."""
            super().load_state_dict(state_dict)
            saved = state_dict["state"]
            order = [i for group in state_dict["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, param in zip(order, params, strict=True):
                self.state[param].update(
                    {
                        name: value.float().to(param.device)
                        for name, value in saved.get(i, {}).items()
                    }
                )

    return MasterAdamW
