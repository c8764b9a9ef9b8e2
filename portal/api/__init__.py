"""The JSON API: `/v1/<nouns>`, one file for each noun, and small shared ones.

    application      puts the nouns together; turns every failure into a problem
    authentication   who calls: bearer tokens, rates, failed attempts
    problems         RFC 9457 answers                 pagination   keyset pages
    requests         strict bodies, networks, instants  office      what handlers work with
    frontdoor        limits on each call, the request log
    openapi, documentation   the description that machines read, and the page for people

An answer is JSON, or for a failure `application/problem+json` with a `code` for programs and a
`detail` that says what to do. What is unknown in a body is refused, never ignored.
"""
