"""What vLLM's worker learns from us (`--worker-extension-cls`): to take new weights while it
serves. It runs in vLLM's process, so it imports nothing of Prefab.
"""

from typing import Any


class Extension:
    """Methods that `POST /collective_rpc` can name; `self` is vLLM's worker."""

    reload_weights: Any  # of the worker that vLLM mixes this class into
    model_runner: Any

    def take_policy(self) -> None:
        """Read the weights again from the folder that the server was started from, and put them in
        place.

        vLLM's `reload_weights` alone leaves a head that is tied to the embedding as it was: on a
        CPU each layer holds a copy of its matrix, packed when it was loaded, and such a head loads
        nothing. Layers that keep their matrix beside the packed one (embedding and head) are packed
        again.
        """
        self.reload_weights()
        for layer in self.model_runner.get_model().modules():
            if hasattr(layer, "cpu_linear") and layer.weight.numel():
                layer.quant_method.process_weights_after_loading(layer)
