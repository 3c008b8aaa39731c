"""The method of arXiv 2510.09152 in plain torch: candidate sets, losses, MoClip, the loop."""
