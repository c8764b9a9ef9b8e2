-- Text that people see holds no C1 control either (U+0080 to U+009F): it could steer a terminal.

CREATE OR REPLACE FUNCTION is_printable(value text, longest integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN char_length(value) <= longest AND value !~ '[\u0001-\u001f\u007f-\u009f]';
