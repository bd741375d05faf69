"""Model -> traced residual branches. Knows no rule."""
