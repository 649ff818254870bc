"""Who is who: certificates, keys, sealed boxes, and the connections that rest on them."""
