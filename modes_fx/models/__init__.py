"""Models: where one is found, loaded or built without weights, and its MoE layers."""
