-- The history of one entity, as the API shows it.
CREATE INDEX change_by_entity ON change (account_id, entity_id, number);
