"""The python models of the repository. They run in Triton's stub processes; `triton_repo/*/1/model.py` names them."""
