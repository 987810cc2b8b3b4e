"""What a person sees: figures, notebook views, the HTML report. No computation of its own."""
