"""Images of containers: fetched once, unpacked once, kept while they are wanted. `store.ImageStore` is the way in.

What takes long or reads what strangers have made runs in a process of its own: `worker`, with `tools`, `layers`,
`layout` and `tree`, which are standard library only. The daemon's side is `store`, made of `getting`, `sweeping`
and `catalogue`; below them `shelf` and `records`, `sources`, `flights` and `errands`.
"""
