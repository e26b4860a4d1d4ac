"""The one training loop and what it stands on: phases go in, a trained model, checkpoints and a history come out."""
