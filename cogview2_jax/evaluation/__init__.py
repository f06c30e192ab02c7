"""How good pictures are: FID and its relatives, and how well pictures fit their captions."""
