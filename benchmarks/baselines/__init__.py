"""What streamconv is measured against; each file says what is fair in it and what is not."""
