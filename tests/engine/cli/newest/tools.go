//go:build tools

package pulumi_cli

import _ "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
