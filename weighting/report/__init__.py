"""What runs of the torchtitan integration did, as one page to read: `weighting report`.

`read` takes in the folders that runs leave, `figures` says what is drawn of them, `charts` draws,
and `page` puts it all together.  Nothing here needs torchtitan.
"""
