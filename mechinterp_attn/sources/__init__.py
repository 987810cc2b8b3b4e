"""The doors: how a model gets in. With ``model.py`` the only room that knows TransformerLens."""
