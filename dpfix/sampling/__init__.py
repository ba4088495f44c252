"""Poisson sampling: the private loader, its ledger of draws, rates and views of samples."""
