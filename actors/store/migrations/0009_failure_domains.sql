-- What fails together with a relay, as it says itself. The previous release writes rows without it.

ALTER TABLE relay
    ADD COLUMN failure_domain text NOT NULL DEFAULT '' CHECK (is_printable(failure_domain, 64));
GRANT UPDATE (failure_domain) ON relay TO holloway_application;
