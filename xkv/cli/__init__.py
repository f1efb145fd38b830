"""What command lines share: flags, answers, the terminal."""
