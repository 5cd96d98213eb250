"""The configurations of PPO, and of GRPO and RLOO, with the fields that they share."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, model_validator

from prefab.factory.engines.vllm_process import has_gpu
from prefab.trainers.common import Attention, Lora, Strict
from prefab.trainers.data import DataConfig
from prefab.trainers.rl.rewards import RewardConfig
from prefab.trainers.trackers import Tracker


class VllmSettings(Strict):
    """Settings of the server that samples. It shares the machine, and a GPU, with training."""

    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="Share of a GPU; TRL's default where it shares one too."
    )
    tensor_parallel: int = Field(1, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0, description="On a CPU.")
    sleep: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="Give the server's GPU memory back while the policy is updated (vLLM's sleep "
        "mode); not with sample_ahead.",
    )
    args: list[str] = Field([], description="Added to vLLM's command line as they are.")


class RlConfig(Strict):
    """What PPO and GRPO have in common: models, data, rewards, sampling, updates, evaluations."""

    model: str = Field(
        description="The policy to begin with: a folder, an embedded model or a hub name."
    )
    reference: str | None = Field(
        None, description="What KL is charged to; left out: the policy as it begins."
    )
    out: str
    store: str | None = Field(
        None, description="Its `evals` get every step; left out: metrics.jsonl alone."
    )
    data: DataConfig | None = Field(
        None,
        description="Prompts: answers to those of train are trained on, those of val are for "
        "evaluation.",
    )
    rewards: list[RewardConfig] = []
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = {}
    pad_token: str | None = None

    steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=2, description="Answers a step.")
    minibatches: int = Field(1, ge=1)
    epochs: int = Field(1, ge=1)
    micro_batch: int = Field(
        16, ge=1, description="Answers a forward at most; gradients add up to the batch."
    )
    sample_batch: int = Field(64, ge=1, description="Prompts answered together.")
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(
        1.0, gt=0, le=10, description="In sampling and in log-probabilities alike."
    )

    sampler: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="vllm: a server of its own, to which the weights are pushed after each update. "
        "Answers of the reference, and those that gold scores, are sampled by transformers. auto: "
        "vllm where there are a GPU and vLLM.",
    )
    vllm: VllmSettings = VllmSettings()
    compile_sampling: bool | Literal["auto"] = Field(
        "auto",
        exclude_if=lambda value: value == "auto",
        description="Sample with a cache of fixed size and a compiled forward, where transformers "
        "samples: faster tokens on a GPU, a slower start. auto: on a GPU.",
    )
    sample_ahead: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="Sample the next step's answers, by the weights before the update, while this "
        "step is updated. Each token's advantage is weighted by how much more likely the updated "
        "policy makes it, at most importance_cap. The step after a checkpoint is sampled anew.",
    )
    importance_cap: float = Field(
        2.0,
        gt=0,
        exclude_if=lambda value: value == 2.0,
        description="Of sample_ahead.",
    )

    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="linear: to 0 at the last step."
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    clip: float = Field(0.2, gt=0, lt=1)

    beta: float = Field(0.05, ge=0, description="KL penalty a token, on rewards as normalised.")
    kl_stop: float | None = Field(30.0, gt=0, description="Nats an answer at which the run ends.")
    normalise: Literal["reference", "none"] = Field(
        "reference",
        description="none: raw rewards; scaling them by 1/deviation is a beta larger by the "
        "deviation.",
    )
    reference_samples: int = Field(
        256, ge=2, description="The reference's answers that the normalisation is taken from."
    )
    unfinished_score: float | None = Field(
        -2.0,
        description="Of an answer cut off by length, as normalised: two deviations below the "
        "reference's mean. null: such answers are scored like any other.",
    )

    unfinished_stop: float = Field(
        0.9,
        gt=0,
        le=1,
        description="The run ends after 5 steps in a row with a larger share of unfinished "
        "answers.",
    )
    max_bad: int = Field(
        3,
        ge=1,
        description="The run ends after so many updates in a row whose loss is not a finite "
        "number.",
    )

    lora: Lora | None = None
    attention: Attention = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int | None = Field(None, ge=1)
    save_every: int = Field(20, ge=1)
    gold: RewardConfig | None = Field(
        None, description="A score that is not trained on, measured beside the proxy."
    )
    eval_every: int = Field(20, ge=1)
    eval_prompts: int = Field(
        256, ge=2, description="The same ones each time; of the validation split."
    )
    stop_on_alarm: bool = False
    report: list[Tracker] = Field(
        [], description="Where metrics are also sent; nothing is sent anywhere unless named here."
    )

    @model_validator(mode="after")
    def _awake(self) -> RlConfig:
        if self.sample_ahead and self.vllm.sleep:
            raise ValueError("sample_ahead needs a server that is awake: leave vllm.sleep out")
        return self

    @property
    def answers_a_prompt(self) -> int:
        """How many answers of a step have the same prompt."""
        return 1

    def compiles_sampling(self, device: str) -> bool:
        """Whether the transformers sampler is to compile its forward on this kind of device."""
        return device == "cuda" if self.compile_sampling == "auto" else self.compile_sampling

    def chosen_sampler(self) -> str:
        """The sampler that `sampler` stands for on this machine."""
        if self.sampler != "auto":
            return self.sampler
        return "vllm" if has_gpu() and find_spec("vllm") is not None else "transformers"


class PpoConfig(RlConfig):
    """A PPO run, resolved. Names of metrics and defaults follow Huang et al. 2024 where they have
    one.
    """

    minibatches: int = Field(2, ge=1)
    epochs: int = Field(4, ge=1)
    value_learning_rate: float = Field(1e-5, gt=0)
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    value: Literal["separate", "shared"] = Field(
        "separate", description="A trunk of its own, or a head on the policy's."
    )
    value_model: str | None = Field(
        None, description="What a separate trunk begins with; left out: the policy."
    )
    value_clip: float | None = Field(0.2, gt=0)
    value_coef: float = Field(0.1, gt=0, description="Matters where the trunk is shared.")
    entropy_coef: float = Field(0.0, ge=0)
    whiten_advantages: bool = True

    kl: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: beta is where the controller begins."
    )
    kl_target: float = Field(6.0, gt=0, description="Nats an answer, of adaptive KL.")
    kl_horizon: float = Field(
        10_000.0, gt=0, description="Answers over which beta may grow e-fold or so."
    )


class GrpoConfig(RlConfig):
    """A GRPO or RLOO run, resolved."""

    method: Literal["grpo", "rloo"] = "grpo"
    group: int = Field(8, ge=2, description="Answers a prompt.")
    scale_rewards: Literal["none", "group", "batch"] = Field(
        "none", description="GRPO: what advantages are divided by."
    )
    kl: Literal["reverse", "forward"] = Field(
        "reverse", description="GRPO: which divergence the loss term has."
    )

    @property
    def answers_a_prompt(self) -> int:
        """See `RlConfig`."""
        return self.group

    @model_validator(mode="after")
    def _divides(self) -> GrpoConfig:
        if self.batch_size % self.group:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of group ({self.group})"
            )
        if self.method == "rloo" and (self.kl != "reverse" or self.scale_rewards != "none"):
            raise ValueError("kl and scale_rewards are GRPO's; RLOO charges KL in the reward")
        return self
