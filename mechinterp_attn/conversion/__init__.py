"""MLPs to heads: fold the norms, build the banks, prove that the model still computes the same."""
