"""The deterministic process upwards, from an image to its latent."""

from typing import Any

from ..process import moves, spacings
from .config import CONSTRAINTS, SAMPLER, StockConfig
from .generalized import GeneralizedDDIMScheduler
from .planned import Kind, Pairs
from .step import Evaluation, Step


class Upwards(StockConfig):
    """Encode without noise, and without a constraint on x̂0 unless it is passed."""

    def _check_noise(self, variance_type: str, eta: float) -> None:
        super()._check_noise(variance_type, eta)
        if self.config.corrector_steps:
            raise ValueError(f"encoding has no corrector: set corrector_steps to 0, not {self.config.corrector_steps}")
        if moves.adds_noise(variance_type, eta):
            raise ValueError(
                f"encoding needs the deterministic process: with noise (eta={eta:g}, variance_type={variance_type!r}) "
                "many x_t lead to one x_s. Pass eta=0.0, variance_type='fixed_small'"
            )

    def _kind(self, eta: float | None) -> Kind:
        if moves.effective_eta("fixed_small", eta, 0.0)[1] > 0:
            raise ValueError(f"encoding is deterministic, and cannot use eta={eta:g}: leave it out")
        return "fixed_small", 0.0

    def _evaluate(self, *args: Any) -> Evaluation:
        config, recompute = self.config, self.config.use_clipped_model_output if args[-1] is None else args[-1]
        if recompute and (config.clip_sample or config.thresholding):
            raise ValueError("use_clipped_model_output=True needs x_t, which an inverse step computes: set it to False")
        return super()._evaluate(*args)

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {SAMPLER: dict.fromkeys(self._set_aside, True)}

    @classmethod
    def _adapt(cls, settings: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Switch off the constraints of a sampler, and remember them for a sampler made from this config."""
        sampler = own.pop(SAMPLER, None)
        settings, own = super()._adapt(settings, own)
        if sampler is None:
            sampler = {key: True for key in CONSTRAINTS if own.get(key, settings.get(key))}
            own |= dict.fromkeys(sampler, False)
        return settings, own | {SAMPLER: sampler}


class InverseDDIMScheduler(Upwards, GeneralizedDDIMScheduler):
    """The steps of `GeneralizedDDIMScheduler` solved for x_t: from an image x_0 to its latent x_T (Section 5.4).

    `timesteps` ascend, and `step(model_output, t − 1, x_s)` computes x_t, the output's `prev_sample`, for neighbours
    s < t on τ. Each step is the exact inverse of the sampler's for the same `model_output`, unless the sampler's hardly
    depends on x_t (`ddim_plugin.process.predictions.unfold`). The network is evaluated at x_s, since x_t is not known
    yet. `GeneralizedDDIMPipeline.encode` can refine each step.

    `from_config` takes the config of any sampler, and a sampler's takes this one's. Noise is refused. Args and errors
    are those of `GeneralizedDDIMScheduler`.
    """

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        return moves.downwards(times)[::-1]

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        move = moves.move(self.path, t, s)
        return Step.up(move, self._prediction(move.start))
