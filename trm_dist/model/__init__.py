"""What is trained: TRM, its losses, its averaged weights, its optimizer."""
