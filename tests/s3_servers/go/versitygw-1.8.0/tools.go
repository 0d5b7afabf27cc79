//go:build tools

// Package tools pins the versitygw command that the tests run.
package tools

import _ "github.com/versity/versitygw/cmd/versitygw"
