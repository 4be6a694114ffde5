"""Which student stands: registered, compared with the one before on the same questions, and what has drifted since."""
