"""Acting with a trained model: observations in, physical action chunks out."""
