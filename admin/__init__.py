"""`holloway admin`: the JSON API from a command line.

Everything is made from the portal's own description of itself (`openapi.json`, a copy that a test
holds to be true): commands, flags, help and completion, so that they are there without a portal,
and a new noun of the API is a new command. What no description can say is in a few files by hand:
how to reach the portal (`connection`), names in place of ids (`names`), what is printed (`output`),
and the declaration of an account (`declaration`).

- `description` reads the OpenAPI document: which nouns, which verbs, which fields.
- `building` makes a command of each, `calling` carries one out.
"""
