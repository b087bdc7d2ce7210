"""Measurements of federa: records under results/, figures under plots/, and the README's tables made from them."""
