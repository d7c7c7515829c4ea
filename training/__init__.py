"""How we learn: losses, data, loop and export of the satellite encoders, in plain PyTorch.

Runs without Dagster (`python -m training`); what its files hold is spelled in graft_pipeline.schemas.
"""
