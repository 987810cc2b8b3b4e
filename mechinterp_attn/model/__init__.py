"""The model of attention heads only: its shape, its banks of heads, its forward pass, its tokens."""
