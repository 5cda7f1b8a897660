"""Thresholds by layer and modality in vLLM, as a plug-in: nothing outside this room imports vLLM.

``vllm serve MODEL --additional-config '{"modes_fx": {"plan": "plan.json", "target": 0.75}}'``, or the same with
``LLM(..., additional_config=...)``. Without such settings the plug-in does nothing. From the ground up:

- ``settings``: what was asked for; the thresholds of each layer, found by the layer's name.
- ``thresholds``: the tensors that live as long as the model, and the operation that drops pairs by them.
- ``cpu_experts``, ``triton_experts``: experts that do not compute dropped pairs.
- ``batch``: which class each token of a batch has.
- ``worker``: puts all of it into a loaded model, or says why not; what a running one answers to.
- ``metrics``: skip ratios in vLLM's log and among its Prometheus metrics.
- ``plugin``: where vLLM calls in. ``endpoint``: another target over HTTP.

A pair that is dropped has weight 0 and, as its expert, the number of experts: one that does not exist.
"""
