"""One prompt with its patterns and norms frozen: every bank a linear map of the residual stream."""
