// What the Python side and the library must agree on. micromix_compile/ops/_extension.py holds the
// same number: raise both when a schema, the placed layout or the meaning of an argument changes.
#pragma once

#define MICROMIX_ABI 7
