"""The distributed step: a ZeRO-sharded student, a sharded EMA teacher, one optimizer step."""
